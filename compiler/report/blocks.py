"""The blocks of a model in order, with what each holds and costs: the data of ribbons, ledgers and differences.

Blocks that are alike in everything but their place share a variant: 88 layers of Super have four.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from n3c.ir.program import LedgerEntry, Program
from n3c.passes.serving import Served

from .cost import call_flops


@dataclass(frozen=True, slots=True)
class Variant:
    """What blocks of one kind have in common."""

    kind: str
    """mamba2, attention, moe, mlp, embedding, norm or head."""
    parameters: int
    flops: int
    """Of one token at the context that was asked for; a multiply-add is two."""
    state_bytes_per_request: int
    """SSM state and convolution window."""
    kv_bytes_per_token: int
    weights: tuple[LedgerEntry, ...]
    """By their names within the block."""

    @property
    def bytes(self) -> int:
        """Return the bytes of its weights."""
        return sum(weight.bytes for weight in self.weights)

    def by_format(self) -> dict[str, int]:
        """Return the bytes of its weights by format, most bytes first."""
        sizes: dict[str, int] = {}
        for weight in self.weights:
            sizes[weight.format] = sizes.get(weight.format, 0) + weight.bytes
        return dict(sorted(sizes.items(), key=lambda item: -item[1]))

    def as_json(self) -> dict[str, Any]:
        """Return one entry of `inspect --json`, key `variants`."""
        return {
            "kind": self.kind,
            "parameters": self.parameters,
            "flops_per_token": self.flops,
            "bytes": self.bytes,
            "by_format": self.by_format(),
            "state_bytes_per_request": self.state_bytes_per_request,
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "weights": [weight.as_json() for weight in self.weights],
        }


@dataclass(frozen=True, slots=True)
class Block:
    """A block at its place."""

    label: str
    """The module: `backbone.layers.3`, `lm_head`, `mtp.layers.0`."""
    layer: int | None
    """Its index in the pattern; None at the ends of the model, and in the MTP block."""
    variant: Variant


def blocks_json(blocks: Sequence[Block], variants: Sequence[Variant] = ()) -> dict[str, Any]:
    """Return the keys `blocks` and `variants` of `inspect --json`; a block names its variant by index.

    `variants` are those of more models than one, in the order that they are to have.
    """
    variants = variants or list(dict.fromkeys(block.variant for block in blocks))
    index = {variant: i for i, variant in enumerate(variants)}
    return {
        "blocks": [
            {"label": b.label, "layer": b.layer, "kind": b.variant.kind, "variant": index[b.variant]} for b in blocks
        ],
        "variants": [variant.as_json() for variant in variants],
    }


@dataclass(slots=True)
class Place:
    """A block while it is gathered."""

    label: str
    kind: str = ""
    layer: int | None = None
    flops: int = 0
    names: list[str] = field(default_factory=list[str])


def places_of(lowered: Program, context: int) -> list[Place]:
    """Return the blocks of a lowered program, for `blocks_of`: the passes, which know formats, forget its FLOPs.

    Of MTP one step is counted. A weight belongs to the first block that reads it.
    """
    places: dict[str, Place] = {}
    seen: set[str] = set()
    counted: set[tuple[str, str]] = set()
    for call in lowered.entry_points["forward"].calls:
        place = places.setdefault(call.label, Place(call.label))
        if (call.label, call.function) in counted:
            continue
        counted.add((call.label, call.function))
        if call.layer is not None or not place.kind:
            place.kind, place.layer = lowered.functions[call.function].kind, call.layer
        place.flops += call_flops(lowered, call, context)
        place.names += [name for name in dict.fromkeys(call.parameters) if name not in seen]
        seen.update(call.parameters)
    return list(places.values())


def blocks_of(places: Sequence[Place], served: Served, layers: int) -> list[Block]:
    """Return the blocks with the formats that the passes gave their weights; the pattern has `layers` of them."""
    ledger = {entry.name: entry for entry in served.program.ledger}
    fixed, growing = _state_bytes(served)
    buffers = {name for name, parameter in served.program.parameters.items() if parameter.buffer}
    return [
        Block(
            place.label,
            place.layer if place.layer is not None and place.layer < layers else None,
            Variant(
                place.kind,
                sum(math.prod(ledger[name].shape) for name in place.names if name not in buffers),
                place.flops,
                fixed.get(place.layer, 0),
                growing.get(place.layer, 0),
                tuple(_within(place.label, ledger[name]) for name in place.names),
            ),
        )
        for place in places
    ]


def _within(label: str, entry: LedgerEntry) -> LedgerEntry:
    return replace(entry, name=entry.name.removeprefix(f"{label}."))


def _state_bytes(served: Served) -> tuple[Mapping[int | None, int], Mapping[int | None, int]]:
    """Return by layer the bytes of a request that stay, and those of each token in a cache."""
    fixed: dict[int | None, int] = {}
    growing: dict[int | None, int] = {}
    for state in served.plan.states:
        if state.kind == "kv":
            growing[state.layer] = growing.get(state.layer, 0) + state.bytes // served.plan.max_seq_len
        elif state.kind != "pending":
            fixed[state.layer] = fixed.get(state.layer, 0) + state.bytes
    return fixed, growing
