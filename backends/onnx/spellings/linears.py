"""Linears and dequantization.

A decode step is bound by the bytes of the weights, so a linear is spelled as a product and a sum,
which compiles to one kernel that reads the stored weight once and copies nothing; a MatMul of the
same operands writes the weight out in a wider type first. `docs/engine-forms.md` has the measurements.
"""

from __future__ import annotations

from math import prod

import onnx_ir as onnx

from n3c.backends.onnx.emitter import DenseWeight, Emitter, Fp8Weight, Nvfp4Weight, Weight
from n3c.backends.onnx.linear_forms import LinearForm
from n3c.ir.formats import NVFP4_BLOCK
from n3c.ir.program import Node
from n3c.ir.types import DType

from . import activations, tables


def dequantize_nvfp4(emitter: Emitter, node: Node) -> None:
    """Bind the codes and scales; the op that reads the weight spells the dequantization."""
    emitter.bind_weight(node.results[0], nvfp4_weight(*map(emitter.get, node.results[0].stored)))


def nvfp4_weight(codes: onnx.Value, scale: onnx.Value, scale_2: onnx.Value) -> Nvfp4Weight:
    """Return a weight of codes and block scales as they are stored, or as bytes."""
    return Nvfp4Weight(codes, scale, scale_2, *(value.dtype is onnx.DataType.INT8 for value in (codes, scale)))


def dequantize_fp8(emitter: Emitter, node: Node) -> None:
    """Bind the codes and the scale; the op that reads the weight spells the dequantization."""
    packed = node["codes"].type.dtype is DType.I8
    emitter.bind_weight(
        node.results[0], Fp8Weight(emitter.operand(node, "codes"), emitter.operand(node, "scale"), packed)
    )


def linear_sum(emitter: Emitter, node: Node, form: LinearForm) -> None:
    """y[b, s, n] = Σₖ x[b, s, k] · w[n, k], times the tensor's scale where the weight has one."""
    g = emitter.graph
    weight = emitter.weight(node["weight"])
    x, x_scale = activations.read(emitter, node["x"], in_planes=in_planes(weight))
    if isinstance(weight, Nvfp4Weight) and weight.packed:
        column = g.node("Unsqueeze", x, g.i64(-2))
        dims = (*emitter.sizes(node.results[0]), emitter.sizes(node["x"])[-1])
        y = tables.e2m1_product(emitter, column, weight.codes, block_scales(emitter, weight), dims)
    elif form == "sum_by_rows":
        y = _rows_fastest(emitter, node, x, weight)
    elif form == "siblings":
        y = _siblings(emitter, node, x, weight)
    else:
        y = _sum(emitter, x, weight)
    scale = product_scale(emitter, weight, x_scale)
    emitter.bind(node.results[0], y if scale is None else g.node("Mul", y, scale))


def in_planes(weight: Weight) -> bool:
    """Return whether a sum reads what it is multiplied with as planes."""
    return isinstance(weight, Nvfp4Weight) and weight.packed


def product_scale(
    emitter: Emitter, weight: Weight, x_scale: onnx.Value | None, experts: int | None = None
) -> onnx.Value | None:
    """Return what the product of codes is multiplied with, [], or [E] for a stack of `experts`; None for nothing."""
    g, scale = emitter.graph, tensor_scale(weight)
    if x_scale is None:
        return scale
    if scale is not None:
        return g.node("Mul", scale, x_scale)
    return x_scale if experts is None else g.node("Expand", x_scale, g.i64(experts))


def _sum(emitter: Emitter, x: onnx.Value, weight: Weight) -> onnx.Value:
    """Return the sums of all rows, [rows, N]; a factor of a row is multiplied with the sum, not with each number."""
    g = emitter.graph
    x, factor = emitter.scaled(x) or (x, None)
    y = g.node(
        "ReduceSum", g.node("Mul", g.node("Unsqueeze", x, g.i64(-2)), unscaled(emitter, weight)), g.i64(-1), keepdims=0
    )
    return y if factor is None else g.node("Mul", y, factor)


def _rows_fastest(emitter: Emitter, node: Node, x: onnx.Value, weight: Weight) -> onnx.Value:
    """Return the sums of several rows, made as [N, rows]: neighbouring outputs read one row of the weight.

    As [rows, N] the whole weight passes before it is read again: where L2 is smaller than it, from memory.
    """
    g = emitter.graph
    *rows, k = emitter.sizes(node["x"])
    row = g.node("Reshape", x, g.i64(1, -1, k))
    product = g.node("Mul", g.node("Unsqueeze", unscaled(emitter, weight), g.i64(1)), row)
    y = g.node("ReduceSum", product, g.i64(-1), keepdims=0)
    return g.node("Reshape", g.node("Transpose", y, perm=[1, 0]), g.i64(*rows, -1))


def _siblings(emitter: Emitter, node: Node, x: onnx.Value, weight: Weight) -> onnx.Value:
    """Return the sums of several rows, each by itself: beside each other they compile to one kernel.

    1 / rms of a norm in front is multiplied with the sum, where else it would be with each number for each output.
    """
    g = emitter.graph
    *rows, k = emitter.sizes(node["x"])
    count, wide = prod(rows), g.node("Unsqueeze", unscaled(emitter, weight), g.i64(0))
    x, factor = emitter.norm_parts(x) or emitter.scaled(x) or (x, None)
    sums = [
        g.node("ReduceSum", g.node("Mul", row, wide), g.i64(-1), keepdims=0)
        for row in g.split(g.node("Reshape", x, g.i64(count, 1, k)), count, 0)
    ]
    y = g.node("Reshape", g.node("Concat", *sums, axis=0), g.i64(*rows, -1))
    return y if factor is None else g.node("Mul", y, factor)


def unscaled(emitter: Emitter, weight: Weight) -> onnx.Value:
    """Return the whole weight in float32, without the scale of the tensor."""
    g = emitter.graph
    match weight:
        case DenseWeight(tensor, is_f32):
            return emitter.widened(tensor, is_f32)
        case Fp8Weight(codes, _, packed):
            return tables.e4m3(emitter, codes) if packed else g.node("DequantizeLinear", codes, g.f32(1.0))
        case Nvfp4Weight(codes, packed=False):
            scales = block_scales(emitter, weight)
            return g.node("DequantizeLinear", codes, scales, axis=-1, block_size=NVFP4_BLOCK)
        case Nvfp4Weight(codes):
            return tables.e2m1(emitter, codes, block_scales(emitter, weight))


def block_scales(emitter: Emitter, weight: Nvfp4Weight, indices: onnx.Value | None = None) -> onnx.Value:
    """Return the E4M3 block scales in float32, or those of the experts `indices`."""
    g = emitter.graph
    if weight.packed_scale:
        chosen = weight.scale if indices is None else tables.rows(emitter, weight.scale, indices)
        return tables.e4m3(emitter, chosen)
    scales = g.node("DequantizeLinear", weight.scale, g.f32(1.0))
    return scales if indices is None else tables.rows(emitter, scales, indices)


def tensor_scale(weight: Weight) -> onnx.Value | None:
    """Return the float32 scale of a tensor, [] or one an expert [E]."""
    match weight:
        case DenseWeight():
            return None
        case Fp8Weight(_, scale):
            return scale
        case Nvfp4Weight():
            return weight.scale_2
