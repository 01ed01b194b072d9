"""Traces hold what a call computed, layer by layer; `differences` compares two."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from n3c.ir.program import EntryPoint, Program
from n3c.runtime.engines.interface import Array
from n3c.specs.kinds import kinds

Trace = Mapping[str, Array]
"""Name of a point → its value: a layer's label for what it gave [B, n, …], a state's name for the state after it."""

Doubts = Mapping[str, Array]
"""Label of a layer that rounds what its linears read → bool [B, n]: the tokens of which sums of another order may round
a number otherwise."""

TOKENS = 4
"""Fewer have no median that leaves one out."""


@dataclass(frozen=True, slots=True)
class Difference:
    """How far a tensor is from that of the reference."""

    point: str
    relative: float
    """Root of the mean squared difference over that of the reference."""
    typical: float
    """The same of the tokens of a layer that nobody doubts, and of the median token where there are `TOKENS`, over that
    of all: the larger of the two."""
    share: float
    """Root of the mean square of what a layer adds to the residual stream, over that of the stream; else 1."""
    largest: float
    """Largest absolute difference."""
    index: tuple[int, ...]
    """Where that is."""


def points(entry: EntryPoint, program: Program) -> dict[str, str | None]:
    """Return the points of an entry point in the order of its layers: each label, and after it its states.

    With each stands the label of the layer whose result it adds something to; None where it is no residual layer, and
    an empty text where all of the result is the layer's own: the MTP block's first layer makes its input, too.
    """
    order: dict[str, str | None] = {}
    label_of: dict[str, str] = {}
    residual = {kind.name for kind in kinds()}  # the result of these is their input and what they add
    for call in entry.calls:
        before = label_of.get(call.inputs[0], "") if program.functions[call.function].kind in residual else None
        if call.outputs:
            order.pop(call.label, None)  # a label's last call is what it gave
            order[call.label] = "" if before == call.label else before
        order.update(dict.fromkeys(call.states))
        label_of.update(dict.fromkeys(call.outputs, call.label))
    return order


def differences(
    order: Mapping[str, str | None], reference: Trace, other: Trace, doubts: Doubts = MappingProxyType({})
) -> Iterator[Difference]:
    """Compare the points that both have, in `order`.

    Where the one has more tokens than the other, the last ones are compared: prefill keeps only its last token.
    """
    for point, before in order.items():
        if point in reference and point in other:
            base = None if before is None else reference.get(before, np.zeros_like(reference[point]))
            yield _difference(point, *_aligned(reference[point], other[point]), base, doubts.get(point))


def _aligned(reference: Array, other: Array) -> tuple[Array, Array]:
    a, b = np.asarray(reference, np.float64), np.asarray(other, np.float64)
    if a.ndim == b.ndim == 3 and a.shape != b.shape:
        tokens = min(a.shape[1], b.shape[1])
        a, b = a[:, -tokens:], b[:, -tokens:]
    return a, b


def _difference(point: str, reference: Array, other: Array, base: Array | None, doubtful: Array | None) -> Difference:
    if reference.shape != other.shape or not np.isfinite(other).all():
        infinite = float("inf")
        return Difference(point, infinite, infinite, 1.0, infinite, ())
    apart = np.abs(other - reference)
    size = _size(reference)
    index = np.unravel_index(int(apart.argmax()), apart.shape) if apart.size else ()
    tokens: Array = np.sqrt(np.square(apart).mean(-1)) if base is not None else np.zeros(1)
    typical = float(np.median(tokens)) if tokens.size >= TOKENS else 0.0
    if doubtful is not None and base is not None:
        typical = max(typical, _size(np.where(doubtful[:, -tokens.shape[1] :], 0, tokens)))
    share = _size(reference - base) / size if base is not None and base.shape == reference.shape and size > 0 else 1.0
    largest = float(apart.max(initial=0.0))
    place = tuple(int(i) for i in index)
    return Difference(point, _over(_size(apart), size), _over(typical, size), share, largest, place)


def _size(array: Array) -> float:
    """Return the root of the mean square."""
    return float(np.sqrt(np.square(array).mean()))


def _over(error: float, size: float) -> float:
    return error / size if size > 0 else (0.0 if error == 0 else float("inf"))
