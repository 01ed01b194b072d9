"""ModelOpt's `config_groups`: bits of weights and of activations, and the modules, or `Linear`, that have them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from n3c.ir.formats import FP8, NVFP4, W4A16_NVFP4

from .modelopt_entries import (
    IN_BF16,
    REQUANTIZE,
    Chosen,
    QuantizationError,
    module_name,
    require_block,
    split_wildcards,
)
from .places import shown

_FOUR, _EIGHT = ("float", 4), ("float", 8)
_FORMATS = {(_FOUR, _FOUR): NVFP4, (_FOUR, None): W4A16_NVFP4, (_EIGHT, _EIGHT): FP8}
"""Bits of weights and of activations → the format; absent activations are not quantized."""


@dataclass(frozen=True, slots=True)
class GroupEntry:
    """One of `config_groups`: a format, and the modules that have it."""

    format: str
    targets: tuple[str, ...]
    path: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Groups:
    """All of `config_groups`."""

    entries: tuple[GroupEntry, ...]

    def __bool__(self) -> bool:
        return bool(self.entries)

    def chosen(self) -> Chosen:
        """Return the formats of these groups alone."""
        default: str | None = None
        formats: dict[str, str] = {}
        for entry in self.entries:
            for target in entry.targets:
                if target == "Linear":
                    if default not in (None, entry.format):
                        message = f"`Linear` is {default} and {entry.format}"
                        raise QuantizationError(message, (*entry.path, "targets"), "name the modules of one of the two")
                    default = entry.format
                else:
                    formats[module_name(target)] = entry.format
        return split_wildcards(default, formats, "config_groups")


def read_groups(config: Mapping[str, object]) -> Groups:
    """Return the `config_groups` of a config, none where it has none; QuantizationError for bits without a format."""
    raw = config.get("config_groups")
    if raw is None:
        return Groups(())
    if not isinstance(raw, dict):
        raise QuantizationError("`config_groups` must be an object", ("config_groups",))
    entries: list[GroupEntry] = []
    for name, value in cast("dict[str, object]", raw).items():
        path = ("config_groups", name)
        group = cast("dict[str, object]", value) if isinstance(value, dict) else {}
        targets = group.get("targets", ["Linear"])
        if not isinstance(targets, list) or not all(isinstance(t, str) for t in cast("list[object]", targets)):
            raise QuantizationError("`targets` must be a list of names", (*path, "targets"))
        names = tuple(cast("list[str]", targets))
        if "Embedding" in names:
            raise QuantizationError("embeddings are quantized", (*path, "targets"), IN_BF16)
        entries.append(GroupEntry(_group_format(group, path), names, path))
    return Groups(tuple(entries))


def _group_format(group: Mapping[str, object], path: tuple[str, ...]) -> str:
    """Return the format that the bits of weights and activations mean."""
    weights, inputs = group.get("weights"), group.get("input_activations")
    if not isinstance(weights, dict):
        raise QuantizationError("`weights` must be an object", (*path, "weights"))
    table = cast("dict[str, object]", weights)
    kinds = (_bits(table), None if inputs is None else _bits(inputs))
    found = _FORMATS.get(kinds)
    dynamic = cast("dict[str, object]", inputs).get("dynamic") if isinstance(inputs, dict) else False
    by_row = table.get("strategy") in ("channel", "block", "token") or (found is FP8 and table.get("group_size"))
    if found is None or (found is FP8 and dynamic) or by_row:
        bits = ["no" if kind is None else f"{kind[1]}-bit {shown(kind[0])}" for kind in kinds]
        how = " by rows" if by_row else " with dynamic scales" if found is not None else ""
        message = f"{bits[0]} weights with {bits[1]} activations{how} are no format of n3c"
        raise QuantizationError(message, path, REQUANTIZE)
    require_block(table, found.name, (*path, "weights"))
    return found.name


def _bits(value: object) -> tuple[str, int]:
    """Return the type and the bits of an element; ("", 0) for what says none."""
    table = cast("dict[str, object]", value) if isinstance(value, dict) else {}
    kind, bits = table.get("type", "float"), table.get("num_bits")
    return (kind, bits) if isinstance(kind, str) and type(bits) is int else ("", 0)
