"""ModelOpt's quantization configs as rules: `hf_quant_config.json`, or `quantization_config` of config.json.

Forms (nvidia-modelopt 0.47): one format with `exclude_modules` (in config.json `ignore`), or
MIXED_PRECISION with `quantized_layers`, which names each quantized module, or a parent of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

from n3c.ir.diagnostics import did_you_mean

from .modules import Group
from .pattern import Pattern
from .places import shown
from .roles import ROLE_GLOBS, select_layers

ALGORITHMS = {"NVFP4": "nvfp4", "W4A16_NVFP4": "w4a16_nvfp4", "FP8": "fp8"}

MAX_MODULES = 1 << 20
"""Most linears of a model whose quantization is read; the largest released model has 98,716."""

_NEVER = ("embedding", "mamba.conv1d", "moe.router")
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
    """What a quantization config says."""

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


def rules_table(groups: Sequence[Group], format_of: Callable[[Group, str], str], pattern: Pattern) -> dict[str, Any]:
    """Return the [quantization] table, as plain values, that gives every module the format that `format_of` says.

    Its rules are few: of roles, of roles in a stretch of layers, and of modules for what is left.
    """
    roles: dict[str, Counter[str]] = {}
    by_group: list[tuple[Group, Counter[str]]] = []
    total: Counter[str] = Counter()
    for group in groups:
        counts = Counter(format_of(group, module) for module in group.modules)
        by_group.append((group, counts))
        roles.setdefault(group.role, Counter()).update(counts)
        total.update(counts)
    del total["bf16"]
    default = max(total, key=lambda name: total[name], default="bf16")
    usual = {role: max(counts, key=lambda name: counts[name]) for role, counts in roles.items()}
    rules = [
        {"roles": role_globs([role for role in usual if usual[role] == chosen], list(usual)), "format": chosen}
        for chosen in ("nvfp4", "w4a16_nvfp4", "fp8", "bf16")
        if chosen != default and chosen in usual.values()
    ]
    rules += _exceptions(by_group, usual, format_of, pattern)
    return {"format": default, "block": [1, 16], "rules": rules}


def _exceptions(
    groups: Sequence[tuple[Group, Counter[str]]],
    usual: Mapping[str, str],
    format_of: Callable[[Group, str], str],
    pattern: Pattern,
) -> list[dict[str, Any]]:
    """Return rules for what differs from the usual format of its role."""
    layers: dict[tuple[str, str], list[int]] = {}  # (role, format) → layers that have it as a whole
    modules: dict[str, list[str]] = {}
    for group, counts in groups:
        other = next(iter(counts))
        if len(counts) == 1 and other != usual[group.role] and group.layer is not None:
            layers.setdefault((group.role, other), []).append(group.layer)
            continue
        for module in group.modules:
            chosen = format_of(group, module) if counts.keys() != {usual[group.role]} else usual[group.role]
            if chosen != usual[group.role]:
                modules.setdefault(chosen, []).append(module)
    selected: dict[tuple[str, str], list[str]] = {}  # (selector, format) → roles
    names = {(group.role, group.layer): group.name for group, _ in groups}
    experts = {group.role: group.experts for group, _ in groups}
    for (role, chosen), wanted in layers.items():
        having = [group.layer for group, _ in groups if group.role == role and group.layer is not None]
        selector = _selector(wanted, having, pattern)
        if selector is not None:
            selected.setdefault((selector, chosen), []).append(role)
        elif experts[role] == 0:
            modules.setdefault(chosen, []).extend(names[role, layer] for layer in wanted)
        else:  # hundreds of experts a layer: a rule for each layer is shorter
            for layer in wanted:
                selected.setdefault((str(layer), chosen), []).append(role)
    present = list(usual)
    rules: list[dict[str, Any]] = [
        {"roles": role_globs(found, present), "layers": selector, "format": chosen}
        for (selector, chosen), found in selected.items()
    ]
    return rules + [{"modules": found, "format": chosen} for chosen, found in modules.items()]


def _selector(wanted: Sequence[int], having: Sequence[int], pattern: Pattern) -> str | None:
    """Return the `layers` selector that picks `wanted` of the layers `having` a role, if there is one."""
    total, low, high = len(pattern), min(wanted), max(wanted)
    span = str(low) if low == high else f"{low}..{high}"
    for selector in ("before attention", f"last {total - low}", f"first {high + 1}", span):
        if select_layers(selector, pattern).intersection(having) == frozenset(wanted):
            return selector
    return None


def role_globs(roles: Sequence[str], present: Sequence[str]) -> list[str]:
    """Shorten a list of roles by globs that match, of the roles `present` in a model, no others."""
    left = list(roles)
    for glob in ROLE_GLOBS:
        matched = [role for role in present if fnmatchcase(role, glob)]
        if len(matched) > 1 and set(matched) <= set(left):
            place = left.index(matched[0])
            left = (
                [role for role in left[:place] if role not in matched]
                + [glob]
                + [role for role in left[place:] if role not in matched]
            )
    return left
