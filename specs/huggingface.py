"""Hugging Face's nemotron_h configuration to a spec and back, without loss.

What Hugging Face has no name for (numerics, serving, pipeline cuts) stands in one object, `"n3c"`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

from .huggingface_blocks import exported_blocks
from .huggingface_import import import_config
from .huggingface_names import STATE_DTYPES, UNSUPPORTED, config_fields, written_twice
from .schema import Spec

__all__ = ["export_config", "import_config"]


def export_config(spec: Spec) -> dict[str, Any]:
    """Return the config.json of a spec, such that importing it gives an equal spec.

    Block types stand in patterns of symbols, and nowhere as a list: no spelling of its entries is read by every
    release of transformers and by SGLang, and some releases refuse any list beside a pattern.
    """
    pattern = spec.model.pattern
    config: dict[str, Any] = {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "dtype": "bfloat16",
        "num_hidden_layers": len(pattern),
        "hybrid_override_pattern": pattern.symbols,
    }
    for path, (name, _, _) in config_fields().items():
        table = spec.section(str(path[0]))
        if table is not None:
            config[name] = getattr(table, str(path[1]))
    config |= {also: config[name] for name, also in written_twice().items() if name in config}
    ends = spec.model.eos_token_ids
    config["eos_token_id"] = None if not ends else ends[0] if len(ends) == 1 else list(ends)
    config |= {name: unused[0] for name, unused in UNSUPPORTED.items() if unused[0] is not None}
    if spec.moe is not None:
        config["n_shared_experts"] = 1 if spec.moe.shared_intermediate_size else 0
    config["mamba_ssm_cache_dtype"] = {ours: theirs for theirs, ours in STATE_DTYPES.items()}[
        spec.serving.ssm_state_dtype
    ]
    config["num_nextn_predict_layers"] = 0 if spec.mtp is None else 1
    if spec.mtp is not None:
        config["mtp_hybrid_override_pattern"] = spec.mtp.pattern.symbols
        config["mtp_num_layers"] = spec.mtp.depth
        config["mtp_loss_scaling_factor"] = spec.mtp.loss_scaling_factor
    if spec.moe is not None and spec.moe.layers:
        config |= {"architectures": ["NemotronHPuzzleForCausalLM"], "model_type": "nemotron_h_puzzle"}
        config |= exported_blocks(spec)
    config["n3c"] = _own(spec)
    return config


def _own(spec: Spec) -> dict[str, Any]:
    own: dict[str, Any] = {"name": spec.name}
    if spec.model.pattern.stages:
        own["pipeline_cuts"] = list(spec.model.pattern.stages)
    for name in ("quantization", "training"):
        table = getattr(spec, name)
        if table is not None:
            own[name] = _plain_table(table)
    if spec.moe is not None and spec.moe.layers:
        own["moe_layers"] = _plain_value(spec.moe.layers)
    own["serving"] = _plain_table(spec.serving)
    del own["serving"]["ssm_state_dtype"]  # it has a name of its own
    return own


def _plain_table(table: Any) -> dict[str, Any]:
    """Return a table of a spec as plain JSON values; what is None is left out."""
    values = {field.name: getattr(table, field.name) for field in dataclasses.fields(table)}
    return {name: _plain_value(value) for name, value in values.items() if value is not None}


def _plain_value(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return _plain_table(value)
    return [_plain_value(entry) for entry in cast("tuple[object, ...]", value)] if isinstance(value, tuple) else value
