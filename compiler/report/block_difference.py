"""The blocks of two models, aligned: which were added, removed or changed, and in what."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import zip_longest
from typing import Any

from .blocks import Block, Variant


@dataclass(frozen=True, slots=True)
class BlockDifference:
    """Blocks that differ in the same way."""

    labels_a: tuple[str, ...]
    """Empty where they were added."""
    labels_b: tuple[str, ...]
    """Empty where they were removed."""
    what: tuple[str, ...]
    """In words, one thing each."""

    def as_json(self) -> dict[str, Any]:
        """Return one entry of `diff --json`, key `blocks`."""
        return {"a": list(self.labels_a), "b": list(self.labels_b), "what": list(self.what)}


def compare_blocks(a: Sequence[Block], b: Sequence[Block]) -> tuple[BlockDifference, ...]:
    """Align the blocks of two models and return those that differ, alike ones together."""
    groups: dict[tuple[Variant | None, Variant | None], tuple[list[str], list[str]]] = {}
    for before, after in _pairs(a, b):
        key = (before.variant if before else None, after.variant if after else None)
        labels_a, labels_b = groups.setdefault(key, ([], []))
        labels_a += [before.label] if before else []
        labels_b += [after.label] if after else []
    return tuple(
        BlockDifference(tuple(labels_a), tuple(labels_b), what)
        for key, (labels_a, labels_b) in groups.items()
        if (what := _what(*key))
    )


def _pairs(a: Sequence[Block], b: Sequence[Block]) -> Iterator[tuple[Block | None, Block | None]]:
    """Yield the blocks that stand at the same place and differ, and those that only one model has."""
    kinds_a, kinds_b = [block.variant.kind for block in a], [block.variant.kind for block in b]
    for tag, a1, a2, b1, b2 in SequenceMatcher(None, kinds_a, kinds_b, autojunk=False).get_opcodes():
        pairs = zip(a[a1:a2], b[b1:b2], strict=True) if tag == "equal" else zip_longest(a[a1:a2], b[b1:b2])
        for before, after in pairs:
            if before is None or after is None or before.variant != after.variant:
                yield before, after


def _what(a: Variant | None, b: Variant | None) -> tuple[str, ...]:
    """Return the differences of two variants in words; none where only the deciding rules are others."""
    if a is None or b is None:
        there = a or b
        assert there is not None
        return (f"{there.kind}, {there.parameters:,} parameters",)
    if a.kind != b.kind:
        return (f"{a.kind} → {b.kind}",)
    weights_a, weights_b = ({weight.name: weight for weight in v.weights} for v in (a, b))
    found = [f"− {name}" for name in weights_a if name not in weights_b]
    found += [f"+ {name}" for name in weights_b if name not in weights_a]
    for name in weights_a:
        if name not in weights_b:
            continue
        before, after = weights_a[name], weights_b[name]
        if before.shape != after.shape:
            found.append(f"{name} {list(before.shape)} → {list(after.shape)}")
        if before.format != after.format:
            found.append(f"{name} {before.format} → {after.format}")
    for said, attribute in (("states of a request", "state_bytes_per_request"), ("KV a token", "kv_bytes_per_token")):
        before, after = getattr(a, attribute), getattr(b, attribute)
        if before != after:
            found.append(f"{said} {before:,} → {after:,} bytes")
    return tuple(found)
