"""ModelOpt's quantization configs as rules: `hf_quant_config.json`, or `quantization_config` of config.json.

Forms (nvidia-modelopt 0.29 to 0.47):

    quant_algo (one format), exclude_modules or `ignore`
    quant_algo MIXED_PRECISION, quantized_layers: each quantized module, or a parent of it, and its format
    config_groups: bits of weights and of activations, and the modules, or `Linear`, that have them

The object may stand one level deeper, under `quantization`. Letter case of algorithms means nothing, as for vLLM.
What would change the meaning is never guessed: what is not read is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

from n3c.ir.formats import FORMATS, FP8

from .modelopt_entries import (
    IN_BF16,
    MIXED,
    WILD,
    Chosen,
    QuantizationError,
    format_of_algorithm,
    module_name,
    parents,
    refuse_awq,
    require_block,
    require_few,
    require_readable,
    split_wildcards,
    upper,
)
from .modelopt_groups import Groups, read_groups
from .modules import Group
from .pattern import Pattern
from .places import shown
from .roles import ROUTERS, not_linear
from .rules_table import rules_table

_MODELOPT_KEYS = {"quant_algo", "quantization", "exclude_modules", "config_groups"}
MAX_MODULES = 1 << 20
"""Most linears of a model whose quantization is read; the largest released model has 98,716."""


@dataclass(frozen=True, slots=True)
class Said:
    """The object of a file that says the formats."""

    table: Mapping[str, object]
    path: tuple[str, ...]
    """Where it stands in the file."""


@dataclass(frozen=True, slots=True)
class Imported:
    """A quantization config, read."""

    table: dict[str, Any]
    """The [quantization] table, as plain values."""
    kv_cache_dtype: str | None
    unknown: tuple[str, ...]
    """Module names that the model does not have."""


def find_quantization(config: Mapping[str, object]) -> Said | None:
    """Return the object of a hf_quant_config.json or config.json that says the formats; None where none does.

    Raises QuantizationError for the config of another tool than ModelOpt.
    """
    for key in ("quantization", "quantization_config"):
        value = config.get(key)
        if value is None:
            continue
        if not isinstance(value, dict):
            raise QuantizationError(f"`{key}` must be an object", (key,))
        table = cast("dict[str, object]", value)
        if not is_modelopt(table):
            advice = "`n3c quantize` makes one of the unquantized checkpoint"
            raise QuantizationError("only ModelOpt's quantization configs are supported", (key, "quant_method"), advice)
        nested = table.get("quantization")
        if not isinstance(nested, dict):
            return Said(table, (key,))
        inner = cast("dict[str, object]", nested)
        for name in inner.keys() & table.keys():
            if inner[name] != table[name]:
                message = f"`{shown(name)}` is given twice, and differs"
                raise QuantizationError(message, (key, "quantization", name), "correct one of the two")
        return Said(table | inner, (key,))
    return None


def is_modelopt(table: Mapping[str, object]) -> bool:
    """Whether a quantization config is ModelOpt's, which vLLM also knows as modelopt_fp4 and modelopt_mixed."""
    if "quant_method" not in table:  # of hf_quant_config.json, and of hands
        return not _MODELOPT_KEYS.isdisjoint(table)
    method = table["quant_method"]
    return isinstance(method, str) and method.lower().startswith("modelopt")


def import_quantization(config: Mapping[str, object], groups: Sequence[Group], pattern: Pattern) -> Imported:
    """Turn a ModelOpt config into a [quantization] table; raises QuantizationError.

    Formats that a whole role has become role rules, those of a stretch of layers role rules with
    `layers`, the rest rules with `modules`.
    """
    if sum(max(1, group.experts) for group in groups) > MAX_MODULES:
        raise QuantizationError(f"the model has more than {MAX_MODULES} linears", ())
    kv_dtype = _kv_cache(config)
    chosen = _chosen(config)
    if chosen is None:
        return Imported({"format": "bf16", "block": [16, 16], "rules": []}, kv_dtype, ())
    excluded = _excluded(config)
    formats: dict[str, str] = {}
    for group in groups:
        for module in group.modules:
            formats[module] = _format_of(group, module, chosen, excluded)
    known = {name for module in formats for name in parents(module)}
    _refuse_quantized_tables(groups, chosen)
    _refuse_parts_of_names(excluded, known, groups, formats)
    names = {**chosen.names, **dict.fromkeys(excluded.names, "")}
    _refuse_other_case((name for name in names if name not in known), known)
    unknown = [name for name in chosen.names if name not in known]
    unknown += sorted(name for name in excluded.names if name not in known and not name.startswith("mtp"))
    return Imported(rules_table(groups, lambda _, module: formats[module], pattern), kv_dtype, tuple(unknown))


def formats_of_files(said: Sequence[Mapping[str, object]], groups: Sequence[Group], pattern: Pattern) -> Imported:
    """Return what the configs of one checkpoint say together, of which there is one at least.

    Raises QuantizationError where two give different formats, since readers prefer one or the other.
    """
    read = [import_quantization(config, groups, pattern) for config in said]
    if any(other.table != read[0].table for other in read[1:]):
        message = "hf_quant_config.json and config.json give different formats"
        raise QuantizationError(message, (), "remove the one that is wrong: readers prefer one or the other")
    kv_dtypes = [imported.kv_cache_dtype for imported in read if imported.kv_cache_dtype is not None]
    return Imported(read[0].table, kv_dtypes[0] if kv_dtypes else None, read[0].unknown)


def _kv_cache(config: Mapping[str, object]) -> str | None:
    algorithm, scheme = config.get("kv_cache_quant_algo"), config.get("kv_cache_scheme")
    if algorithm is None and scheme is None:
        return None
    said = cast("dict[str, object]", scheme) if isinstance(scheme, dict) else {}
    as_fp8 = said.get("num_bits") == 8 and said.get("type", "float") == "float"
    if (algorithm is None or upper(algorithm) == FP8.modelopt) and (scheme is None or as_fp8):
        return "fp8"
    path = ("kv_cache_quant_algo",) if scheme is None or as_fp8 else ("kv_cache_scheme",)
    what = shown(str(algorithm)) if scheme is None or as_fp8 else f"{said.get('num_bits')} bits, {said.get('type')}"
    advice = "the weights do not depend on it: write FP8, or null for a BF16 cache"
    raise QuantizationError(f"only an FP8 cache is supported, not `{shown(what)}`", path, advice)


@dataclass(frozen=True, slots=True)
class _Excluded:
    """The modules that a config leaves out."""

    key: str
    names: frozenset[str]
    globs: tuple[str, ...]

    def __contains__(self, module: str) -> bool:
        return any(name in self.names for name in parents(module)) or any(
            fnmatchcase(module, glob) for glob in self.globs
        )


def _format_of(group: Group, module: str, chosen: Chosen, excluded: _Excluded) -> str:
    named = chosen.named(module)
    if module in excluded:
        if chosen.names.get(module) is not None:
            message = f"`{shown(module)}` is both quantized and left out"
            raise QuantizationError(message, (excluded.key,), "remove one of the two")
        return "bf16"
    if named is not None:
        return "bf16" if group.role in not_linear() else named
    # Not linears for ModelOpt, so a uniform format does not mean them, excluded or not; nor does it mean MTP.
    never = group.role in not_linear() | ROUTERS or group.role.startswith("mtp.")
    return chosen.default if chosen.default is not None and not never else "bf16"


def _chosen(config: Mapping[str, object]) -> Chosen | None:
    """Return the formats that a config gives; None: nothing is quantized."""
    refuse_awq(config, ())
    algorithm = config.get("quant_algo")
    groups = read_groups(config)
    if algorithm is None:
        if groups:
            return groups.chosen()
        if "quant_algo" in config:
            return None
        advice = "add `quant_algo`, null where nothing is quantized"
        raise QuantizationError("it has neither `quant_algo` nor `config_groups`", (), advice)
    if upper(algorithm) == MIXED:
        if "quantized_layers" not in config and groups:
            return groups.chosen()
        return _mixed(config, groups)
    path = ("quant_algo",)
    chosen = format_of_algorithm(algorithm, path)
    require_block(config, chosen, ())
    if not groups:
        return Chosen(chosen, {}, {})
    for entry in groups.entries:
        if entry.format != chosen and entry.format != FORMATS[chosen].weight_only:
            message = f"`quant_algo` is {shown(str(algorithm))}, but `{entry.path[1]}` has the bits of {entry.format}"
            raise QuantizationError(message, entry.path, "correct one of the two")
    return groups.chosen()


def _mixed(config: Mapping[str, object], groups: Groups) -> Chosen:
    raw = config.get("quantized_layers")
    if not isinstance(raw, dict):
        raise QuantizationError("`quantized_layers` must be an object", ("quantized_layers",))
    by_group = {module_name(target): entry for entry in groups.entries for target in entry.targets}
    names: dict[str, str] = {}
    for name, value in cast("dict[str, object]", raw).items():
        path = ("quantized_layers", name)
        entry = cast("dict[str, object]", value) if isinstance(value, dict) else {}
        refuse_awq(entry, path)
        format_ = format_of_algorithm(entry.get("quant_algo"), path)
        require_block(entry, format_, path)
        module = module_name(name)
        group = by_group.get(module)
        if group is not None and group.format != format_:
            if group.format != FORMATS[format_].weight_only:
                message = f"`{shown(name)}` is {format_}, but `{group.path[1]}` has the bits of {group.format}"
                raise QuantizationError(message, group.path, "correct one of the two")
            format_ = group.format
        if names.get(module, format_) != format_:
            raise QuantizationError(f"`{shown(module)}` is given twice, and differs", path, "correct one of the two")
        names[module] = format_
    return split_wildcards(None, names, "quantized_layers")


def _excluded(config: Mapping[str, object]) -> _Excluded:
    keys = [key for key in ("exclude_modules", "ignore") if config.get(key) is not None]
    entries: list[str] = []
    for key in keys:
        raw = config[key]
        if not isinstance(raw, list) or not all(isinstance(name, str) for name in cast("list[object]", raw)):
            raise QuantizationError(f"`{key}` must be a list of names", (key,))
        for name in cast("list[str]", raw):
            require_readable(name, key)
            entries.append(module_name(name))
    key = keys[0] if keys else "ignore"
    globs = tuple(sorted({name for name in entries if WILD & set(name)}))
    require_few(globs, key)
    return _Excluded(key, frozenset(entries) - frozenset(globs), globs)


def _refuse_quantized_tables(groups: Sequence[Group], chosen: Chosen) -> None:
    """Refuse formats of weights that no linear multiplies with."""
    for group in groups:
        if group.role in not_linear() and group.name in chosen.names:
            raise QuantizationError(f"`{group.name}` is quantized", ("quantized_layers",), IN_BF16)
    for glob in chosen.globs:
        matched = [group for group in groups if fnmatchcase(group.name.format(0), glob)]
        if matched and all(group.role in not_linear() for group in matched):
            raise QuantizationError(f"`{matched[0].name}` is quantized", ("quantized_layers",), IN_BF16)


def _refuse_parts_of_names(
    excluded: _Excluded, known: set[str], groups: Sequence[Group], formats: Mapping[str, str]
) -> None:
    """Refuse what is left out by a part of a name: vLLM takes it so, others do not."""
    every = "\n".join(group.name for group in groups)
    for name in sorted(name for name in excluded.names if name not in known and name in every):
        for group in groups:
            if name in group.name and formats[group.modules[0]] != "bf16":
                message = f"`{shown(name)}` is a part of names, as of `{group.name.format(0)}`: readers differ on it"
                raise QuantizationError(message, (excluded.key,), f"write `*{shown(name)}*`, or the full names")


def _refuse_other_case(unknown: Iterator[str], known: set[str]) -> None:
    folded = {name.casefold(): name for name in known}
    for name in unknown:
        if name.casefold() in folded:
            message = f"`{shown(name)}` matches no module"
            raise QuantizationError(message, (), f"did you mean `{folded[name.casefold()]}`?")
