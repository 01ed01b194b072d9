"""The two files in which ModelOpt says what of a checkpoint is quantized, as vLLM, SGLang and TensorRT read them.

`hf_quant_config.json` and `quantization_config` of config.json say the same. One algorithm for all is
written with the modules that it leaves out; several with one key for each quantized module, routed experts
one by one, since not every reader understands a key for all experts of a layer. W4A16_NVFP4 for all is written both
ways, in hf_quant_config.json as several, in config.json as one with such keys: as one, TensorRT Edge-LLM, which reads
the first, quantizes activations with a scale of 1; as several, llama.cpp, which reads the second where it has keys,
lets activations of routed experts be rounded to 4 bits.
Names are full names of linears, as vLLM also takes an excluded name as a part of another one; where all routed
experts of a layer are left out, so is `….mixer.experts`, the only name that SGLang asks for. No name carries the
suffix that ModelOpt 0.47 appends by mistake under transformers 5. Of a checkpoint in which nothing is quantized
neither file says anything, since vLLM refuses a config without an algorithm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from n3c.backends.safetensors.layout import KEEP, Weight
from n3c.ir.formats import FORMATS, FP8, NVFP4_BLOCK, W4A16_NVFP4
from n3c.specs.huggingface_names import MTP, MTP_PATTERN_LISTS, PATTERN_LISTS, TIME_STEP_MIN, written_twice
from n3c.specs.roles import ROUTERS

PRODUCER = "modelopt"
"""Readers look for this name; `n3c` says under its own key who wrote the file."""
LAYOUT_VERSION = "0.47.0"
"""The ModelOpt release whose layout this is."""

QUANTIZATION = "quantization_config"
_SHAPE_KEYS = (
    "architectures",
    "model_type",
    "num_hidden_layers",
    "hybrid_override_pattern",
    "mtp_hybrid_override_pattern",
)
_NOT_KEPT = {QUANTIZATION, "n3c", *PATTERN_LISTS, *MTP_PATTERN_LISTS}
"""Of the source's config.json: what is written anew, and lists of block types (see `export_config`)."""
_NEVER = ROUTERS | {"embedding"}
"""Not linears to any reader: never listed as left out, as convolutions are."""


def algorithm(weight: Weight) -> str | None:
    """Return ModelOpt's name of a weight's format: NVFP4 only where activations have a scale; None: not quantized."""
    if weight.format == KEEP:
        return None
    format_ = FORMATS[weight.format]
    return format_.modelopt if weight.scales_input or not format_.weight_only else FORMATS[format_.weight_only].modelopt


def is_quantized(weights: Sequence[Weight]) -> bool:
    """Whether any of `weights` is: only then have the two configs something to say."""
    return any(weight.format != KEEP for weight in weights)


def quantization(weights: Sequence[Weight], kv_cache: str | None) -> dict[str, Any]:
    """Return the `quantization` object of hf_quant_config.json, of weights that `is_quantized`.

    `kv_cache` is "FP8" or None.
    """
    layers = {weight.in_file(weight.module): chosen for weight in weights if (chosen := algorithm(weight)) is not None}
    algorithms = sorted(set(layers.values()))
    if len(algorithms) > 1 or W4A16_NVFP4.modelopt in algorithms:
        quantized = {module: _layer(chosen) for module, chosen in sorted(layers.items(), key=_by_layer)}
        return {
            "quant_algo": "MIXED_PRECISION",
            "kv_cache_quant_algo": kv_cache,
            "quantized_layers": quantized,
        }
    (only,) = algorithms
    found: dict[str, Any] = {"quant_algo": only, "kv_cache_quant_algo": kv_cache}
    if only != FP8.modelopt:
        found["group_size"] = NVFP4_BLOCK
    return found | {"exclude_modules": left_out(weights)}


def left_out(weights: Sequence[Weight]) -> list[str]:
    """Return the linears and convolutions that are not quantized, and the layers whose experts are not, sorted."""
    kept = {
        weight.in_file(weight.module)
        for weight in weights
        if weight.format == KEEP
        and weight.name.endswith(".weight")
        and len(weight.shape) > 1
        and weight.role not in _NEVER
        and not weight.name.endswith("embeddings.weight")
    }
    experts = {parent for module in kept if (parent := _experts(module))}
    quantized = {_experts(weight.in_file(weight.module)) for weight in weights if weight.format != KEEP}
    return sorted(kept | (experts - quantized), key=_natural)


def _experts(module: str) -> str:
    """Return the `….experts` that a routed expert's linear belongs to; empty for another linear."""
    parent = module.rpartition(".")[0].rpartition(".")[0]
    return parent if parent.endswith(".experts") else ""


def _by_layer(item: tuple[str, str]) -> list[str]:
    return _natural(item[0])


def _natural(name: str) -> list[str]:
    """Order `layers.2` before `layers.10`."""
    return [f"{int(part):08d}" if part.isdecimal() else part for part in name.split(".")]


def _layer(chosen: str) -> dict[str, Any]:
    return {"quant_algo": chosen} if chosen == FP8.modelopt else {"quant_algo": chosen, "group_size": NVFP4_BLOCK}


def hf_quant_config(weights: Sequence[Weight], kv_cache: str | None) -> dict[str, Any]:
    """Return hf_quant_config.json."""
    return {"producer": _producer(), "quantization": quantization(weights, kv_cache)}


def _producer() -> dict[str, str]:
    return {"name": PRODUCER, "version": LAYOUT_VERSION, "written_by": f"n3c {version('n3c')}"}


def quantization_config(weights: Sequence[Weight], kv_cache: str | None) -> dict[str, Any]:
    """Return the `quantization_config` of config.json."""
    said = quantization(weights, kv_cache)
    members: dict[str, list[str]] = {}
    for weight in weights:
        chosen = algorithm(weight)
        if chosen is not None:
            members.setdefault(chosen, []).append(weight.in_file(weight.module))
    mixed = "quantized_layers" in said
    groups = {
        f"group_{i}": _group(chosen) | {"targets": sorted(members[chosen], key=_natural) if mixed else ["Linear"]}
        for i, chosen in enumerate(sorted(members))
    }
    (one, *others) = members
    algorithm_of_all = said["quant_algo"] if others else one
    found: dict[str, Any] = {"quant_method": "modelopt", "quant_algo": algorithm_of_all, "config_groups": groups}
    if mixed:
        found["quantized_layers"] = said["quantized_layers"]
    found["ignore"] = left_out(weights)
    if kv_cache == "FP8":
        found["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    return found | {"producer": _producer()}


def _group(chosen: str) -> dict[str, Any]:
    bits: dict[str, Any] = {"dynamic": False, "num_bits": 8 if chosen == FP8.modelopt else 4, "type": "float"}
    if chosen != FP8.modelopt:
        bits["group_size"] = NVFP4_BLOCK
    return {"weights": bits} if chosen == W4A16_NVFP4.modelopt else {"input_activations": bits, "weights": bits}


def config_json(
    source: Mapping[str, Any], exported: Mapping[str, Any], weights: Sequence[Weight], kv_cache: str | None
) -> dict[str, Any]:
    """Return config.json: that of the source, with what it lacks of `exported` (the spec's config), and its formats.

    Lists of block types are left out: the patterns and the number of layers say the same. Of the source's `n3c` the
    smallest fresh time step is kept, as its field of that name is.
    """
    config = {key: value for key, value in source.items() if key not in _NOT_KEPT}
    for key in (*_SHAPE_KEYS, *written_twice().values()):
        if config.get(key) is None and key in exported:
            config[key] = exported[key]
    if not any(weight.name.startswith("mtp.") for weight in weights):
        config = {key: value for key, value in config.items() if key not in MTP} | {"num_nextn_predict_layers": 0}
    if is_quantized(weights):
        config[QUANTIZATION] = quantization_config(weights, kv_cache)
    kept = {key: value for key, value in (source.get("n3c") or {}).items() if key == TIME_STEP_MIN}
    return config | {"n3c": exported["n3c"] | kept}


def multimodal_config(outer: Mapping[str, Any], name: str, text: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config.json of several models: `outer` with `text` at `name`, whose formats are said of the whole."""
    inner, said = dict(text), {key: text[key] for key in (QUANTIZATION,) if key in text}
    inner.pop(QUANTIZATION, None)
    return {key: value for key, value in outer.items() if key != QUANTIZATION} | {name: inner} | said
