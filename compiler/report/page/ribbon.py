"""The ribbon of layers: the blocks of a model in the groups in which its pattern repeats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from n3c.specs.kinds import kinds
from n3c.specs.pattern import Pattern

_SYMBOLS = {"embedding": "emb", "norm": "norm", "head": "head"}
_TITLES = {"embedding": "embedding", "norm": "final norm", "head": "head"}
LEAST = 4
"""Blocks of a group from which each of its repetitions is a segment of its own."""


def titles() -> dict[str, str]:
    """Return the title of each kind of function."""
    return {kind.name: kind.title for kind in kinds()} | _TITLES


@dataclass(frozen=True, slots=True)
class Cell:
    """A block of the ribbon."""

    label: str
    symbol: str
    variant: int


@dataclass(frozen=True, slots=True)
class Segment:
    """Blocks that fold together."""

    title: str
    """A piece of pattern, or where the blocks are."""
    place: str
    """`layers 0-8`."""
    bytes: int
    cells: tuple[Cell, ...]


def ribbon(figures: Mapping[str, Any], pattern: Pattern) -> tuple[Segment, ...]:
    """Return the segments of a model: what is before the layers, the pieces of the pattern, what is behind, MTP."""
    blocks: list[dict[str, Any]] = figures["blocks"]
    symbols = {kind.name: kind.symbol for kind in kinds()} | _SYMBOLS
    cells = [(b, Cell(b["label"], symbols.get(b["kind"]) or b["kind"], b["variant"])) for b in blocks]
    layers = [cell for block, cell in cells if block["layer"] is not None]
    mtp = [cell for block, cell in cells if block["label"].startswith("mtp")]
    ends = [cell for block, cell in cells if block["layer"] is None and cell not in mtp]

    def segment(title: str, place: str, found: Sequence[Cell]) -> Segment:
        size = sum(figures["variants"][cell.variant]["bytes"] for cell in found)
        return Segment(title, place, size, tuple(found))

    parts = [
        segment(text, f"layers {first}–{last}" if last > first else f"layer {first}", layers[first : last + 1])
        for text, first, last in pieces(pattern)
    ]
    before = [segment("embedding", "", ends[:1])]
    behind = [segment("head", "", ends[1:])] if ends[1:] else []
    return (*before, *parts, *behind, *([segment("MTP", f"{len(mtp)} blocks", mtp)] if mtp else []))


def pieces(pattern: Pattern) -> Iterator[tuple[str, int, int]]:
    """Yield the pieces of a pattern that fold, with first and last layers: repetitions of groups, and the rest."""
    first, rest = 0, ""
    for text in _items(pattern.compact()):
        group, count = _repeated(text)
        size = len(Pattern.parse(group))
        if count > 1 and size >= LEAST:
            if rest:
                length = len(Pattern.parse(rest))
                yield rest.strip(), first, first + length - 1
                first, rest = first + length, ""
            for _ in range(count):
                yield group, first, first + size - 1
                first += size
        else:
            rest += f" {text}"
    if rest:
        yield rest.strip(), first, first + len(Pattern.parse(rest)) - 1


def _items(text: str) -> Iterator[str]:
    """Yield what stands between white space outside brackets, without cuts."""
    depth, item = 0, ""
    for char in text:
        depth += (char == "(") - (char == ")")
        if char in " |" and depth == 0:
            if item:
                yield item
            item = ""
        else:
            item += char
    if item:
        yield item


def _repeated(item: str) -> tuple[str, int]:
    """Return the inside of `(…)4` and its count; anything else once."""
    head, bracket, count = item.rpartition(")")
    if not item.startswith("(") or not bracket or not count.isdecimal():
        return item, 1
    return head[1:], int(count)
