"""Layers that differ from their table: `[[moe.layers]]`, resolved for each block.

Blocks are counted as parameters are: those of the trunk from 0, and behind them those of multi-token prediction.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from .blocks import MOE, Moe, MoeLayers
from .keys import MTP_LAYERS
from .pattern import Pattern
from .roles import select_layers
from .schema import Spec

PER_LAYER = ("top_k", "intermediate_size", "shared_intermediate_size")
"""The keys of [moe] that may differ: Megatron-core's overrides of a layer, without the number of experts."""


def spec_of_block(spec: Spec, block: int) -> Spec:
    """Return the spec with the tables that a block has."""
    moe = moe_of_block(spec, block)
    return spec if moe is spec.moe else replace(spec, moe=moe)


def moe_of_block(spec: Spec, block: int | None) -> Moe | None:
    """Return [moe] as a block has it, without entries of its own; None where the spec has no [moe]."""
    moe = spec.moe
    if moe is None or not moe.layers or block is None:
        return moe
    keys: dict[str, Any] = {}
    for entry in moe.layers:
        if block in selected_blocks(entry.layers, spec.model.pattern, block + 1):
            keys |= given_keys(entry)
    return replace(moe, layers=(), **keys)


def moe_tables(spec: Spec) -> tuple[Moe, ...]:
    """Return [moe] as each MoE block has it, those of multi-token prediction last."""
    tables = (moe_of_block(spec, block) for block, kind in enumerate(spec.blocks) if kind is MOE)
    return tuple(table for table in tables if table is not None)


def given_keys(entry: MoeLayers) -> dict[str, int]:
    """Return the keys that an entry gives, with their values."""
    return {key: value for key in PER_LAYER if (value := getattr(entry, key)) is not None}


def selected_blocks(selector: str, pattern: Pattern, total: int) -> frozenset[int]:
    """Return the blocks, of `total`, that the `layers` of an entry selects; ValueError as `select_layers`."""
    if selector == MTP_LAYERS:
        return frozenset(range(len(pattern), total))
    return select_layers(selector, pattern)


def entries_for(keys_of: Mapping[int, Mapping[str, Any]], pattern: Pattern) -> list[dict[str, Any]]:
    """Return entries that give blocks their keys: one for each stretch of MoE blocks with the same, one for MTP."""
    stretches: list[tuple[int, int, Mapping[str, Any]]] = []
    for layer in pattern.layers(MOE):
        keys = keys_of.get(layer, {})
        if stretches and stretches[-1][2] == keys:
            stretches[-1] = (stretches[-1][0], layer, keys)
        else:
            stretches.append((layer, layer, keys))
    entries = [
        {"layers": str(first) if first == last else f"{first}..{last}", **keys}
        for first, last, keys in stretches
        if keys
    ]
    beyond: Iterable[Mapping[str, Any]] = (keys for block, keys in keys_of.items() if block >= len(pattern))
    mtp = next(iter(beyond), None)
    return entries + ([{"layers": MTP_LAYERS, **mtp}] if mtp else [])
