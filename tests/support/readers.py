"""The rules by which other loaders read a quantized checkpoint's configs, written from their sources.

Written anew from their rules, for checkpoints of nemotron_h:

- vLLM, vllm/model_executor/layers/quantization/modelopt.py (ModelOptQuantConfigBase, ModelOptNvFp4Config,
  ModelOptMixedPrecisionConfig) and utils/quant_utils.py (is_layer_skipped); model names by the mapper of
  models/nemotron_h.py (`backbone` → `model`).
- SGLang, python/sglang/srt/layers/quantization/modelopt_quant.py (ModelOptQuantConfig, ModelOptFp4Config,
  ModelOptMixedPrecisionConfig).
- TensorRT Edge-LLM, tensorrt_edgellm/config.py (_parse_quant, module_quant_type).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

MERGED = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}
"""A linear of the loaders → those of the checkpoint that it holds."""


@dataclass(frozen=True)
class Layer:
    """A layer as a loader builds it: `name` in the checkpoint's spelling, and what it holds of the checkpoint."""

    name: str
    modules: tuple[str, ...]
    experts: bool = False


def layers_of(modules: Iterable[str]) -> list[Layer]:
    """Return what vLLM and SGLang build of a checkpoint's linears: q, k and v are one, a layer's experts are one."""
    found: dict[str, list[str]] = {}
    for module in modules:
        parent, _, last = module.rpartition(".")
        merged = next((name for name, parts in MERGED.items() if last in parts), None)
        if merged is not None:
            found.setdefault(f"{parent}.{merged}", []).append(module)
        elif re.fullmatch(r".*\.experts\.\d+", parent):
            found.setdefault(parent.rpartition(".")[0], []).append(module)
        else:
            found[module] = [module]
    return [Layer(name, tuple(parts), name.endswith(".experts")) for name, parts in found.items()]


def _in_model(name: str) -> str:
    return "model." + name.removeprefix("backbone.") if name.startswith("backbone.") else name


class Vllm:
    """Reads config.json's quantization_config, or the whole of hf_quant_config.json."""

    algorithms: tuple[str, ...] = ("FP8", "NVFP4", "W4A16_NVFP4", "MIXED_PRECISION")

    def __init__(self, config: Mapping[str, Any]) -> None:
        legacy = config.get("quantization")
        said: Mapping[str, Any] = config if legacy is None else legacy
        self.algorithm = str(said["quant_algo"]).upper()
        assert self.algorithm in self.algorithms
        if legacy is None:
            assert str(config["quant_method"]).startswith("modelopt")
            scheme = config.get("kv_cache_scheme") or {}
            self.kv_cache = "FP8" if (scheme.get("type"), scheme.get("num_bits")) == ("float", 8) else None
            excluded = config.get("ignore", [])
        else:
            if "NVFP4" in self.algorithm:
                assert {"group_size", "kv_cache_quant_algo", "exclude_modules"} <= set(said)
            self.kv_cache = said.get("kv_cache_quant_algo")
            excluded = said.get("exclude_modules", [])
        assert int(said.get("group_size") or 16) == 16
        self.excluded = [_in_model(name) for name in excluded]
        self.layers = {_in_model(name): entry for name, entry in said.get("quantized_layers", {}).items()}
        assert self.layers or self.algorithm != "MIXED_PRECISION"

    def skips(self, prefix: str, last: str) -> bool:
        """Tell as is_layer_skipped does; all parts of a merged linear must agree."""
        if last in MERGED:
            parts = {prefix.removesuffix(last) + part in self.excluded for part in MERGED[last]}
            assert len(parts) == 1, f"{prefix}: some are excluded, some are not"
            return parts.pop()
        if "experts" in prefix:
            return any(prefix in name for name in self.excluded if "experts" in name)
        return prefix in self.excluded

    def format(self, layer: Layer) -> str | None:
        """Return the algorithm that a layer is loaded with; None: not quantized."""
        prefix = _in_model(layer.name)
        last = prefix.rpartition(".")[2]
        if self.skips(prefix, last) or any(
            (name in prefix and name != prefix) or fnmatch(prefix, name) for name in self.excluded
        ):
            return None
        return self.algorithm if self.algorithm != "MIXED_PRECISION" else self.resolved(prefix, last)

    def resolved(self, prefix: str, last: str) -> str | None:
        """Return what `quantized_layers` says of a layer: itself, then its parts, then any child."""
        if prefix in self.layers:
            return str(self.layers[prefix]["quant_algo"])
        base = prefix.rpartition(".")[0]
        parts = [f"{base}.{part}" for part in MERGED.get(last, ())]
        found = {str(self.layers[part]["quant_algo"]) for part in parts if part in self.layers}
        assert len(found) < 2, f"{prefix}: {found}"
        children = (str(entry["quant_algo"]) for name, entry in self.layers.items() if name.startswith(f"{prefix}."))
        return found.pop() if found else next(children, None)


class Sglang(Vllm):
    """Differs in what it takes for excluded, and in what it knows: weight-only NVFP4 of single layers alone."""

    algorithms: tuple[str, ...] = ("FP8", "NVFP4", "MIXED_PRECISION")  # W4A16_NVFP4 as an entry of the last

    def format(self, layer: Layer) -> str | None:
        """Return the algorithm that a layer is loaded with; None: not quantized."""
        prefix = _in_model(layer.name)
        last = prefix.rpartition(".")[2]
        patterns = [re.compile(name.replace(".", r"\.").replace("*", ".*")) for name in self.excluded]
        if any(pattern.fullmatch(text) for pattern in patterns for text in (prefix, *prefix.split("."))):
            return None
        if not layer.experts and self.skips(prefix, last):
            return None
        return self.algorithm if self.algorithm != "MIXED_PRECISION" else self.resolved(prefix, last)


class EdgeLlm:
    """Reads hf_quant_config.json and the names of the tensors; every linear by its own name."""

    def __init__(self, hf_quant_config: Mapping[str, Any], tensors: Iterable[str]) -> None:
        said = hf_quant_config["quantization"]
        self.algorithm = str(said["quant_algo"]).upper()
        self.layers = {name: entry["quant_algo"] for name, entry in said.get("quantized_layers", {}).items()}
        names = set(tensors)
        scaled = {name.removesuffix(".weight_scale") for name in names if name.endswith(".weight_scale")}
        weights = {name.removesuffix(".weight") for name in names if name.endswith(".weight")}
        self.excluded = (set(said.get("exclude_modules", [])) - scaled) | (weights - scaled)

    def format(self, module: str) -> str | None:
        """Return `fp8`, `nvfp4` or, of single layers alone, `w4a16_nvfp4`; None: not quantized."""
        if module in self.excluded:
            return None
        if self.algorithm == "MIXED_PRECISION":
            algorithm = str(self.layers.get(module, ""))
            if algorithm == "W4A16_NVFP4":
                return "w4a16_nvfp4"
        else:
            algorithm = self.algorithm
        return "fp8" if "FP8" in algorithm else "nvfp4" if "FP4" in algorithm else None
