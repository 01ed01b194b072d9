"""The text model of a multimodal config: Nemotron 3 Nano Omni, Super-VL, and what else nests a nemotron_h config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

TEXT_CONFIGS = ("text_config", "llm_config")
"""Where the text model stands: transformers' name, and that of the remote code of earlier releases."""
TEXT_MODELS = ("nemotron_h", "nemotron_h_dense", "nemotron_h_sparse", "nemotron_h_puzzle")
"""Its `model_type`."""


def text_config(config: Mapping[str, object]) -> tuple[str, Mapping[str, object]] | None:
    """Return the name and the config of the text model; None where the config is not of several models."""
    for name in TEXT_CONFIGS:
        nested = config.get(name)
        if isinstance(nested, dict) and config.get("model_type") not in TEXT_MODELS:
            table = cast("dict[str, object]", nested)
            kind = table.get("model_type", "nemotron_h" if _is_nemotron(config) else None)
            if kind in TEXT_MODELS:
                return name, table | {"model_type": kind}
    return None


def _is_nemotron(config: Mapping[str, object]) -> bool:
    """Whether the type of a multimodal config says that its text model is a nemotron_h."""
    kind = str(config.get("model_type", ""))
    return kind.startswith("NemotronH_") or kind == "nemotron_h_omni"


def other_models(config: Mapping[str, object]) -> list[str]:
    """Return the names of the configs of the other models."""
    nested = (name for name in config if name.endswith("_config") and name not in TEXT_CONFIGS)
    return [name for name in nested if isinstance(config[name], dict) and name != "quantization_config"]
