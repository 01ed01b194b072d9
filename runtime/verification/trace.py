"""What a call computed, layer by layer, and how far two of them are apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from n3c.ir.program import EntryPoint
from n3c.runtime.engines.interface import Array

Trace = Mapping[str, Array]
"""Name of a point → its value: a layer's label for what it gave [B, n, …], a state's name for the state after it."""


@dataclass(frozen=True, slots=True)
class Difference:
    """How far a tensor is from that of the reference."""

    point: str
    relative: float
    """Root of the mean squared difference over that of the reference: one expert that is chosen otherwise by a
    rounding error moves it little, a wrong weight much."""
    largest: float
    """Largest absolute difference."""
    index: tuple[int, ...]
    """Where that is."""


def points(entry: EntryPoint) -> list[str]:
    """Return the points of an entry point in the order of its layers: each label, and behind it its states."""
    order: dict[str, None] = {}
    for call in entry.calls:
        if call.outputs:
            order.pop(call.label, None)  # a label's last call is what it gave
            order[call.label] = None
        order.update(dict.fromkeys(call.states))
    return list(order)


def differences(order: list[str], reference: Trace, other: Trace) -> Iterator[Difference]:
    """Compare the points that both have, in `order`.

    Where the one has more tokens than the other, the last ones are compared: prefill keeps only its last token.
    """
    for point in order:
        if point in reference and point in other:
            yield _difference(point, *_aligned(reference[point], other[point]))


def _aligned(reference: Array, other: Array) -> tuple[Array, Array]:
    a, b = np.asarray(reference, np.float64), np.asarray(other, np.float64)
    if a.ndim == b.ndim == 3 and a.shape != b.shape:
        tokens = min(a.shape[1], b.shape[1])
        a, b = a[:, -tokens:], b[:, -tokens:]
    return a, b


def _difference(point: str, reference: Array, other: Array) -> Difference:
    if reference.shape != other.shape or not np.isfinite(other).all():
        return Difference(point, float("inf"), float("inf"), ())
    apart = np.abs(other - reference)
    size = float(np.sqrt(np.square(reference).mean()))
    error = float(np.sqrt(np.square(apart).mean()))
    index = np.unravel_index(int(apart.argmax()), apart.shape) if apart.size else ()
    relative = error / size if size > 0 else (0.0 if error == 0 else float("inf"))
    return Difference(point, relative, float(apart.max(initial=0.0)), tuple(int(i) for i in index))
