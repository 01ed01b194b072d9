"""Tolerances: how far an implementation may be from the reference, which rounds the same numbers.

What is left between the two is the order of sums, `LAYER` of a tensor's size, and its consequence: a value that
lies next to the middle of two neighbours may be rounded to the other one. Of N values that are rounded, `FLIPS` and
those within `NEAR` of a middle may; h being the distance of neighbours over the root mean square of the values
(`DISTANCE`), the relative error of what is rounded is then

    h sqrt(FLIPS / N + NEAR / h)

What a layer makes of it, squares (relu2) and gates, at most doubles that. It is an error of what the layer adds to the
residual stream, so it counts by the share that this has of the stream. In BF16 one of a thousand values is so near, so
every token has some. In E2M1 and E4M3 they are rare, and the reference knows which tokens have one (`Doubts`): all
others together (`Difference.typical`), and a layer that has none, are held to the order of sums alone. So is the median
token, which finds a scale that is off by a hundredth where all are doubtful.

One thing is not rounded at the same places: attention over several tokens takes BF16 where caches are narrower than
float32, and rounds scaled queries, scores, probabilities and results, each by 2^-8 at most.

Graphs that are compared so begin every layer and every step with what the reference gave, so nothing adds up over the
depth. Plans cannot (`end_to_end`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod, sqrt

from n3c.ir.program import Program, State
from n3c.ir.types import DType
from n3c.runtime.engines.reference.engine_products import NEAR, EngineProducts

from .scenario import Step
from .trace import Difference, Doubts

FLOAT32 = 1e-4
"""The order of float32 sums over all layers; measured differences are below 2e-6."""
LAYER = 2e-5
"""The same of one layer; measured differences are below 1e-6, and a sum of K has about sqrt(K) 6e-8."""
DISTANCE: Mapping[str, float] = {"nvfp4": 2 / 3, "fp8": 1 / 8, "bf16": 2**-7, "f8e4m3": 1 / 8, "f16": 2**-10}
"""Of two neighbours over the root mean square of what is rounded, by formats of products and types of states.

E2M1 is coarsest from 4 to 6, a third of a block's largest value, which is about twice the root mean square; the others
have the distance relative to a value, 2⁻ᵐ for m stored bits of significand.
"""
FLIPS = 4
"""Values of a tensor that may go the other way, however few there are."""
ATTENTION = 4 * 2**-8
NOISE: Mapping[str, float] = {"nvfp4": 0.1, "fp8": 0.03, "bf16": 2**-8}
"""Root mean square error of rounding activations to a format, over their own."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Allowed differences: of all tokens together, and of the median token."""

    relative: float
    typical: float


Tolerance = Callable[[Step, Difference, Doubts], Bounds]


def float32(step: Step, difference: Difference, doubts: Doubts) -> Bounds:
    """Return the bounds of implementations that round nothing."""
    return Bounds(FLOAT32, FLOAT32)


class AsDeployed:
    """The bounds of graphs that run layer by layer, and round states and activations as the reference does."""

    def __init__(self, program: Program, products: EngineProducts, hidden_size: int) -> None:
        self._program, self._products, self._hidden_size = program, products, hidden_size

    def __call__(self, step: Step, difference: Difference, doubts: Doubts) -> Bounds:
        """Return the bounds of a point: a layer's label or a state's name."""
        entry = self._program.entry_points[step.entry]
        inputs = step.tokens.size * self._hidden_size
        strict, flips = LAYER, 0.0
        for call in entry.calls:
            if difference.point not in (call.label, *call.states):
                continue
            formats = self._products.formats(self._program, entry, call)
            if call.label not in doubts or doubts[call.label].any():
                flips += sum(_flips(format_, inputs) for format_ in formats - {"bf16"})
            common = _flips("bf16", inputs) if "bf16" in formats else 0.0  # so many values that every token has some
            narrow = [
                state for name in call.states if (state := self._program.states[name]).type.dtype is not DType.F32
            ]
            flips += sum(_flips(state.type.dtype.value, _written(state, step)) for state in narrow)
            if any(state.kind == "kv" for state in narrow) and entry.tokens > 1:
                common += ATTENTION
            strict += common * difference.share
        return Bounds(strict + flips * difference.share, strict)


def _written(state: State, step: Step) -> int:
    """Return how many values a step writes into a state: a row a token, or all of a recurrence's."""
    dims = [size for size in state.type.dims if isinstance(size, int)]
    if state.kind == "ssm":
        return len(step.tokens) * prod(dims)
    return step.tokens.size * (dims[0] * dims[2] if state.kind == "kv" else dims[0])


def _flips(type_: str, values: int) -> float:
    """Return twice the error of those of `values` that are rounded to the other neighbour."""
    distance = DISTANCE[type_]
    return 2 * distance * sqrt(FLIPS / values + NEAR / distance)


def end_to_end(program: Program, products: EngineProducts) -> Tolerance:
    """Return the bounds of plans, which run from their own states on.

    Two roundings of activations that differ have errors that are independent of each other, `NOISE` in each layer, and
    the errors of L layers add up as √L; BF16 is what TensorRT may choose for the products of any layer.
    """
    formats = {"bf16"}.union(
        *(products.formats(program, entry, call) for entry in program.entry_points.values() for call in entry.calls)
    )
    layers = len({call.label for call in program.calls()})
    bound = max(NOISE[format_] for format_ in formats) * sqrt(layers)
    return lambda step, difference, doubts: Bounds(bound, bound)
