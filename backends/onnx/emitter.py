"""The state of an emission: which ONNX value stands for which IR value, and what spellings share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as onnx

from n3c.ir.program import Node, Value
from n3c.ir.types import DType

from .graph import GraphBuilder


@dataclass(frozen=True, slots=True)
class Nvfp4Weight:
    """A weight in NVFP4 that is not dequantized yet: its reader decides how."""

    codes: onnx.Value
    """FLOAT4E2M1 [..., N, K], or the same bytes as INT8 [..., N, K/2]."""
    scale: onnx.Value
    """FLOAT8E4M3FN [..., N, K/16]."""
    scale_2: onnx.Value
    """FLOAT [] or [E]."""
    packed: bool
    """Whether codes are bytes."""


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """A weight in FP8 that is not dequantized yet."""

    codes: onnx.Value
    """FLOAT8E4M3FN [..., N, K]."""
    scale: onnx.Value
    """FLOAT [] or [E]."""


@dataclass(frozen=True, slots=True)
class DenseWeight:
    """A weight in a floating-point type, as stored."""

    tensor: onnx.Value
    is_f32: bool


Weight = Nvfp4Weight | Fp8Weight | DenseWeight


class Emitter:
    """What a spelling works with. `dims` gives each symbolic dim its size."""

    def __init__(self, graph: GraphBuilder, dims: dict[str, int]) -> None:
        self.graph = graph
        self.dims = dims
        self._values: dict[int, onnx.Value] = {}
        self._weights: dict[int, Weight] = {}
        self._shared: dict[tuple[object, ...], onnx.Value] = {}

    def bind(self, value: Value, made: onnx.Value) -> None:
        """Let `made` stand for `value`."""
        self._values[id(value)] = made

    def bind_results(self, node: Node, made: Sequence[onnx.Value]) -> None:
        """Let `made` stand for the results of `node`."""
        for value, result in zip(node.results, made, strict=True):
            self.bind(value, result)

    def bind_weight(self, value: Value, weight: Weight) -> None:
        """Let a weight that is not dequantized stand for `value`."""
        self._weights[id(value)] = weight

    def get(self, value: Value) -> onnx.Value:
        """Return what stands for `value`; KeyError if only a quantized weight does."""
        return self._values[id(value)]

    def operand(self, node: Node, index: int) -> onnx.Value:
        """Return what stands for a required operand."""
        return self.get(node.operand(index))

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

    def shared(self, key: tuple[object, ...], make: Callable[[], onnx.Value]) -> onnx.Value:
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
