"""ModelOpt's quantization configs as rules: `hf_quant_config.json`, or `quantization_config` of config.json.

Forms (nvidia-modelopt 0.47): one format with `exclude_modules` (in config.json `ignore`), or
MIXED_PRECISION with `quantized_layers`, which names each quantized module, or a parent of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

from n3c.ir.diagnostics import did_you_mean
from n3c.ir.formats import FORMATS

from .modules import Group
from .pattern import Pattern
from .places import shown
from .roles import NOT_LINEAR, ROUTERS
from .rules_table import rules_table

ALGORITHMS = {format_.modelopt: format_.name for format_ in FORMATS.values() if format_.modelopt}
"""ModelOpt's name of a format → ours."""

MAX_MODULES = 1 << 20
"""Most linears of a model whose quantization is read; the largest released model has 98,716."""

_NEVER = NOT_LINEAR | ROUTERS
"""Not linears for ModelOpt, so a uniform format does not mean them, excluded or not; nor does it mean MTP."""


class QuantizationError(ValueError):
    """A quantization config that cannot become rules; `path` is where in it."""

    def __init__(self, message: str, path: tuple[str, ...], advice: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.path = path
        self.advice = advice


@dataclass(frozen=True, slots=True)
class Imported:
    """A quantization config, read."""

    table: dict[str, Any]
    """The [quantization] table, as plain values."""
    kv_cache_dtype: str | None
    unknown: tuple[str, ...]
    """Module names that the model does not have."""


def import_quantization(config: Mapping[str, object], groups: Sequence[Group], pattern: Pattern) -> Imported:
    """Turn a ModelOpt config into a [quantization] table; raises QuantizationError.

    Formats that a whole role has become role rules, those of a stretch of layers role rules with
    `layers`, the rest rules with `modules`.
    """
    if sum(max(1, group.experts) for group in groups) > MAX_MODULES:
        raise QuantizationError(f"the model has more than {MAX_MODULES} linears", ())
    algorithm = config.get("quant_algo")
    kv_dtype = _kv_cache(config)
    if algorithm is None:
        return Imported({"format": "bf16"}, kv_dtype, ())
    if algorithm == "MIXED_PRECISION":
        format_of, unknown = _mixed(config, groups)
    else:
        format_of, unknown = _uniform(_format(algorithm, ("quant_algo",)), config, groups)
    return Imported(rules_table(groups, format_of, pattern), kv_dtype, unknown)


def _kv_cache(config: Mapping[str, object]) -> str | None:
    algorithm, scheme = config.get("kv_cache_quant_algo"), config.get("kv_cache_scheme")
    if algorithm is None and scheme is None:
        return None
    bits = cast("dict[str, object]", scheme).get("num_bits") if isinstance(scheme, dict) else None
    if algorithm == "FP8" or (algorithm is None and bits == 8):
        return "fp8"
    path = ("kv_cache_quant_algo",) if algorithm is not None else ("kv_cache_scheme",)
    raise QuantizationError("only an FP8 cache is supported", path)


def _format(algorithm: object, path: tuple[str, ...]) -> str:
    if isinstance(algorithm, str) and algorithm in ALGORITHMS:
        return ALGORITHMS[algorithm]
    advice = did_you_mean(algorithm[:80], ALGORITHMS) if isinstance(algorithm, str) else None
    wanted = f"supported are {', '.join(ALGORITHMS)} and MIXED_PRECISION"
    raise QuantizationError(f"quantization algorithm `{shown(str(algorithm))}`: {wanted}", path, advice)


def module_name(name: str) -> str:
    """Return a module name as checkpoints spell it.

    ModelOpt 0.47 with transformers 5 ends each name with a dot, a null and a mangled sentinel, and multimodal
    checkpoints put the language model under a prefix.
    """
    name = name.split(".\0", 1)[0].removeprefix("language_model.")
    return "backbone." + name.removeprefix("model.") if name.startswith("model.") else name


def _mixed(
    config: Mapping[str, object], groups: Sequence[Group]
) -> tuple[Callable[[Group, str], str], tuple[str, ...]]:
    raw = config.get("quantized_layers")
    if not isinstance(raw, dict):
        raise QuantizationError("`quantized_layers` must be an object", ("quantized_layers",))
    formats: dict[str, str] = {}
    for name, entry in cast("dict[str, object]", raw).items():
        path = ("quantized_layers", name)
        algorithm = cast("dict[str, object]", entry).get("quant_algo") if isinstance(entry, dict) else None
        formats[module_name(name)] = _format(algorithm, path)

    def format_of(group: Group, module: str) -> str:
        for name in _parents(module):
            if name in formats:
                return formats[name]
        return "bf16"

    known = {name for group in groups for module in group.modules for name in _parents(module)}
    return format_of, tuple(name for name in formats if name not in known)


def _parents(module: str) -> list[str]:
    """Return `module` and the modules around it that a config may name instead."""
    names = [module]
    while "." in names[-1]:
        names.append(names[-1].rpartition(".")[0])
    return names


def _uniform(
    chosen: str, config: Mapping[str, object], groups: Sequence[Group]
) -> tuple[Callable[[Group, str], str], tuple[str, ...]]:
    raw = config.get("exclude_modules", config.get("ignore", []))
    entries = cast("list[object]", raw) if isinstance(raw, list) else None
    if entries is None or not all(isinstance(name, str) for name in entries):
        key = "exclude_modules" if "exclude_modules" in config else "ignore"
        raise QuantizationError(f"`{key}` must be a list of names", (key,))
    names = [module_name(str(name)) for name in entries]
    exact = {name for name in names if "*" not in name}
    globs = sorted({name for name in names if "*" in name and len(name) <= 200})

    def format_of(group: Group, module: str) -> str:
        never = group.role in _NEVER or group.role.startswith("mtp.")
        excluded = any(name in exact for name in _parents(module)) or any(fnmatchcase(module, glob) for glob in globs)
        return "bf16" if never or excluded else chosen

    known = {name for group in groups for module in group.modules for name in _parents(module)}
    return format_of, tuple(sorted(name for name in exact if name not in known and not name.startswith("mtp")))
