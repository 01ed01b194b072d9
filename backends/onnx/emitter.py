"""The state of an emission: which ONNX value stands for which IR value, and what spellings share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import onnx_ir as onnx

from n3c.ir.program import Node, Value
from n3c.ir.types import DType

from .graph import GraphBuilder
from .linear_forms import LinearForm


@dataclass(frozen=True, slots=True)
class Nvfp4Weight:
    """A weight in NVFP4 that is not dequantized yet: its reader decides how."""

    codes: onnx.Value
    """FLOAT4E2M1 [..., N, K], or the same bytes as INT8 [..., N, K/16, 8]."""
    scale: onnx.Value
    """FLOAT8E4M3FN [..., N, K/16]."""
    scale_2: onnx.Value
    """FLOAT [] or [E]."""
    packed: bool
    """Whether codes are bytes."""
    packed_scale: bool = False
    """Whether block scales are bytes."""


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """A weight in FP8 that is not dequantized yet."""

    codes: onnx.Value
    """FLOAT8E4M3FN [..., N, K]."""
    scale: onnx.Value
    """FLOAT [] or [E]."""
    packed: bool = False
    """Whether codes are bytes."""


@dataclass(frozen=True, slots=True)
class DenseWeight:
    """A weight in a floating-point type, as stored."""

    tensor: onnx.Value
    is_f32: bool


Weight = Nvfp4Weight | Fp8Weight | DenseWeight


@dataclass(frozen=True, slots=True)
class Rounded:
    """What a linear reads, to be rounded to a format: its reader decides in which type."""

    divided: onnx.Value
    """FLOAT [..., K], divided by the scale."""
    dims: tuple[int, ...]
    scale: onnx.Value
    """FLOAT []."""
    format: str
    """`nvfp4` or `fp8`."""


@dataclass(frozen=True, slots=True)
class Share:
    """Weights that were divided by their sum."""

    of: onnx.Value
    """The weights before they were divided by their sum."""
    factor: float
    """With which they are multiplied besides."""


Rendering = Literal["engine", "float32"]
"""For whom a graph is: `engine` for TensorRT, `float32` for a CPU: no narrow types, plain matrix products."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows that a call wrote into an FP8 cache, for the attention of the same call."""

    before: onnx.Value
    """The cache as FLOAT8E4M3FN [B, H, M, P], to be read at the places before the call's tokens only."""
    values: onnx.Value
    """The call's rows as the cache holds them, float32 [B, H, S, P]."""


class Emitter:
    """The context in which a spelling emits its op. `dims` gives each symbolic dim its size."""

    def __init__(
        self,
        graph: GraphBuilder,
        dims: dict[str, int],
        form: Callable[[Node], LinearForm],
        rendering: Rendering = "engine",
        *,
        wide: bool = True,
    ) -> None:
        self.graph = graph
        self.dims = dims
        self.form = form
        """The form of a linear, in what is for engines."""
        self.rendering: Rendering = rendering
        self.wide = wide
        """Whether matrix products over many rows take activations in float32 rather than in BF16."""
        self._rounded: dict[int, Rounded] = {}
        self._views: dict[int, onnx.Value] = {}
        self._norms: dict[int, Callable[[], Sequence[onnx.Value]]] = {}
        self._scaled: dict[int, tuple[onnx.Value, onnx.Value]] = {}
        self._shares: dict[int, Share] = {}
        self._written: dict[int, Rows] = {}
        self._values: dict[int, onnx.Value] = {}
        self._weights: dict[int, Weight] = {}
        self._shared: dict[tuple[object, ...], Sequence[onnx.Value]] = {}

    def bind(self, value: Value, made: onnx.Value) -> None:
        """Bind the ONNX value `made` to the IR value `value`."""
        self._values[id(value)] = made

    def bind_results(self, node: Node, made: Sequence[onnx.Value]) -> None:
        """Bind the ONNX values `made` to the results of `node`."""
        for value, result in zip(node.results, made, strict=True):
            self.bind(value, result)

    def bind_weight(self, value: Value, weight: Weight) -> None:
        """Bind a weight that is not dequantized to `value`."""
        self._weights[id(value)] = weight

    def bind_rounded(self, value: Value, rounded: Rounded) -> None:
        """Bind an activation that is not rounded yet to `value`."""
        self._rounded[id(value)] = rounded

    def rounded(self, value: Value) -> Rounded | None:
        """Return `value` as an activation that a format rounds; None where none does."""
        return self._rounded.get(id(value))

    def bind_view(self, value: Value, view: onnx.Value) -> None:
        """Note the same bytes of a formal in its other type: of a state that of the IR, of codes i8."""
        self._views[id(value)] = view

    def view(self, value: Value) -> onnx.Value:
        """Return a formal in its other type, if it is bound in two, or in its only one."""
        return self._views[id(value)]

    def bind_written(self, value: Value, rows: Rows) -> None:
        """Note what a call wrote to make `value` of a cache."""
        self._written[id(value)] = rows

    def written(self, value: Value) -> Rows | None:
        """Return what a call wrote to make `value`, where it must not be read back."""
        return self._written.get(id(value))

    def bind_norm(self, made: onnx.Value, parts: Callable[[], Sequence[onnx.Value]]) -> None:
        """Note how the ONNX value `made` of an RMSNorm comes of x · weight and 1 / rms, which `parts` makes."""
        self._norms[id(made)] = parts

    def norm_parts(self, made: onnx.Value) -> tuple[onnx.Value, onnx.Value] | None:
        """Return x · weight and 1 / rms, whose product is `made`, where that is the result of an RMSNorm."""
        if id(made) not in self._norms:
            return None
        weighted, reciprocal = self.shared_many(("norm", id(made)), self._norms[id(made)])
        return weighted, reciprocal

    def bind_scaled(self, made: onnx.Value, x: onnx.Value, factor: onnx.Value) -> None:
        """Note that the ONNX value `made` is x [..., K] times a factor [..., 1]."""
        self._scaled[id(made)] = x, factor

    def scaled(self, made: onnx.Value) -> tuple[onnx.Value, onnx.Value] | None:
        """Return x [..., K] and the factor [..., 1] whose product is `made`, where that is known."""
        return self._scaled.get(id(made))

    def bind_share(self, made: onnx.Value, share: Share) -> None:
        """Note how the ONNX value `made` was divided by its sum along the last axis."""
        self._shares[id(made)] = share

    def share(self, made: onnx.Value) -> Share | None:
        """Return how `made` was divided by its sum; None where it was not."""
        return self._shares.get(id(made))

    def get(self, value: Value) -> onnx.Value:
        """Return what stands for `value`; KeyError if only a quantized weight does."""
        return self._values[id(value)]

    def operand(self, node: Node, name: str) -> onnx.Value:
        """Return what stands for an operand that is not left out."""
        return self.get(node[name])

    def weight(self, value: Value) -> Weight:
        """Return `value` as the weight of a linear."""
        return self._weights.get(id(value)) or DenseWeight(self.get(value), value.type.dtype is DType.F32)

    def sizes(self, value: Value) -> tuple[int, ...]:
        """Return the dims of `value` as integers."""
        return value.type.bind(self.dims).static_dims

    def f32(self, value: Value) -> onnx.Value:
        """Return `value` as float32."""
        return self.widened(self.get(value), value.type.dtype is DType.F32)

    def widened(self, made: onnx.Value, is_f32: bool) -> onnx.Value:
        """Return `made` as float32, which it already is if `is_f32`."""
        return made if is_f32 else self.graph.node("Cast", made, to=onnx.DataType.FLOAT)

    def activation(self, x: onnx.Value) -> onnx.Value:
        """Return float32 x in the type of matrix products."""
        return x if self.wide else self.graph.node("Cast", x, to=onnx.DataType.BFLOAT16)

    def shared(self, key: tuple[object, ...], make: Callable[[], onnx.Value]) -> onnx.Value:
        """Return what `make` made the first time that `key` was asked for."""
        return self.shared_many(key, lambda: (make(),))[0]

    def shared_many(self, key: tuple[object, ...], make: Callable[[], Sequence[onnx.Value]]) -> Sequence[onnx.Value]:
        """Return what `make` made the first time that `key` was asked for."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]


Spelling = Callable[[Emitter, Node], None]
"""Emits the nodes of one IR op and binds its results."""


def integer(node: Node, attribute: str) -> int:
    """Return an integer attribute."""
    value = node.attributes[attribute]
    assert isinstance(value, int)
    return value


def number(node: Node, attribute: str) -> float:
    """Return a numeric attribute."""
    value = node.attributes[attribute]
    assert isinstance(value, int | float)
    return float(value)
