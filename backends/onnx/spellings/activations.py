"""Activations that a format quantizes: divided by their scale, rounded, and multiplied with it after the product."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as onnx

from n3c.backends.onnx.emitter import Emitter, Rounded
from n3c.backends.onnx.linear_forms import LEAST_IN_PLANES
from n3c.ir.formats import E2M1_MAX, E4M3_MAX, NVFP4_BLOCK
from n3c.ir.program import Node, Value

F8E4M3FN = 17
"""Of TRT_FP4DynamicQuantize's attribute scale_type."""
_MOST_DIMS = 3
_E4M3_LEAST = 2.0**-9
"""The least E4M3 number above 0."""


def quantize_activation(emitter: Emitter, node: Node) -> None:
    """Bind x / scale; the op that reads it spells the rounding in the type that it multiplies in."""
    scale, format_ = emitter.operand(node, "scale"), str(node.attributes["format"])
    x, dims = emitter.operand(node, "x"), emitter.sizes(node["x"])
    emitter.bind_rounded(node.results[0], divided(emitter, x, dims, scale, format_))


def divided(emitter: Emitter, x: onnx.Value, dims: tuple[int, ...], scale: onnx.Value, format_: str) -> Rounded:
    """Return x / scale, to be rounded."""
    reciprocal = emitter.graph.node("Reciprocal", scale)
    return Rounded(emitter.graph.node("Mul", x, reciprocal), dims, scale, format_)


def reshaped(emitter: Emitter, x: Rounded, *dims: int) -> Rounded:
    """Return x in other dims, of which the last is the same."""
    return Rounded(emitter.graph.node("Reshape", x.divided, emitter.graph.i64(*dims)), dims, x.scale, x.format)


def read(emitter: Emitter, value: Value, *, in_planes: bool = False) -> tuple[onnx.Value, onnx.Value | None]:
    """Return what a sum reads, float32, rounded where it is to be, and the scale to multiply its result with.

    `in_planes` says that the reader cuts it into planes. Then rounding to FP4 is spelled out: it compiles to one kernel
    with what precedes it, where TensorRT's own is two besides. Other readers would compute it anew for each output.
    """
    rounded = emitter.rounded(value)
    if rounded is None:
        return emitter.get(value), None
    if not in_planes or rounded.format == "fp8" or rounded.dims[-1] < LEAST_IN_PLANES:
        return values(emitter, rounded), rounded.scale
    key = ("rounded by arithmetic", id(rounded.divided))
    return emitter.shared(key, lambda: _in_fp4_by_arithmetic(emitter, rounded)), rounded.scale


def values(emitter: Emitter, x: Rounded, *, wide: bool = True) -> onnx.Value:
    """Return the rounded values of x [..., K] without its scale, in float32 or, unless `wide`, the type of products."""
    key = ("rounded", id(x.divided), wide or emitter.wide)
    return emitter.shared(key, lambda: _in_fp8(emitter, x.divided) if x.format == "fp8" else _in_fp4(emitter, x, wide))


def _in_fp8(emitter: Emitter, x: onnx.Value) -> onnx.Value:
    g = emitter.graph
    if emitter.rendering == "float32":  # no CPU has a kernel for QuantizeLinear to E4M3
        clipped = g.node("Clip", x, g.f32(-E4M3_MAX), g.f32(E4M3_MAX))
        return g.node("Cast", g.node("Cast", clipped, to=onnx.DataType.FLOAT8E4M3FN), to=onnx.DataType.FLOAT)
    one = g.f32(1.0)
    codes = g.node("QuantizeLinear", x, one, output_dtype=onnx.DataType.FLOAT8E4M3FN)
    return g.node("DequantizeLinear", codes, one)


def _in_fp4(emitter: Emitter, x: Rounded, wide: bool) -> onnx.Value:
    """TensorRT takes the scale of the whole tensor as a constant only, so it is 1; and no more than three dims."""
    g = emitter.graph
    if emitter.rendering == "float32":
        return _in_fp4_by_arithmetic(emitter, x)
    exact = x.divided if wide else emitter.activation(x.divided)
    flat = exact if len(x.dims) <= _MOST_DIMS else g.node("Reshape", exact, g.i64(-1, x.dims[-1]))
    attributes = {"axis": -1, "block_size": NVFP4_BLOCK, "scale_type": F8E4M3FN}
    codes, scales = g.nodes_results("TRT_FP4DynamicQuantize", (flat, _one(emitter, wide=wide)), 2, "trt", attributes)
    y = from_fp4(emitter, codes, scales, wide=wide)
    return y if len(x.dims) <= _MOST_DIMS else g.node("Reshape", y, g.i64(*x.dims))


def from_fp4(emitter: Emitter, codes: onnx.Value, scales: onnx.Value, *, wide: bool) -> onnx.Value:
    """Return codes times scales: 6 significant bits, so exact in BF16 too."""
    g = emitter.graph
    step = g.node("DequantizeLinear", scales, _one(emitter, wide=wide))
    return g.node("DequantizeLinear", codes, step, axis=-1, block_size=NVFP4_BLOCK)


def _one(emitter: Emitter, *, wide: bool) -> onnx.Value:
    """Return 1 in float32 or in the type of products."""
    return emitter.graph.constant(np.array(1, np.float32 if wide or emitter.wide else ml_dtypes.bfloat16))


def _in_fp4_by_arithmetic(emitter: Emitter, x: Rounded) -> onnx.Value:
    """E2M1 has steps of 0.5 up to 2, of 1 up to 4 and of 2 up to 6; Round takes ties to even, which codes do too.

    A block whose scale is 0 gives zeros, divided by whatever it is.
    """
    g, rank = emitter.graph, len(x.dims)
    blocks = g.node("Reshape", x.divided, g.i64(*x.dims[:-1], x.dims[-1] // NVFP4_BLOCK, NVFP4_BLOCK))
    turn = [*range(rank - 1), rank, rank - 1]
    planes = g.node("Transpose", blocks, perm=turn)  # [..., 16, K/16]

    def number(value: float) -> onnx.Value:
        """Return a constant of as many dims as the planes: TensorRT's parser adds layers where some are missing."""
        return g.constant(np.full((1,) * (rank + 1), value, np.float32))

    step = _in_fp8(emitter, g.node("Div", _peak(emitter, planes), number(E2M1_MAX)))
    ratio = g.node("Div", planes, g.node("Max", step, number(_E4M3_LEAST)))
    ratio = g.node("Clip", ratio, g.f32(-E2M1_MAX), g.f32(E2M1_MAX))
    size = g.node("Abs", ratio)
    unit = g.node("Where", g.node("Less", size, number(4.0)), number(1.0), number(2.0))
    unit = g.node("Where", g.node("Less", size, number(2.0)), number(0.5), unit)
    code = g.node("Mul", g.node("Round", g.node("Div", ratio, unit)), unit)
    return g.node("Reshape", g.node("Transpose", g.node("Mul", code, step), perm=turn), g.i64(*x.dims))


def _peak(emitter: Emitter, planes: onnx.Value) -> onnx.Value:
    """Return the largest size of a block, [..., 1, K/16], of planes [..., 16, K/16].

    As a reduction it would be a kernel by itself.
    """
    g, peak = emitter.graph, emitter.graph.node("Abs", planes)
    for _ in range(NVFP4_BLOCK.bit_length() - 1):
        peak = g.node("Max", *g.split(peak, 2, -2))
    return peak
