"""Linears over many rows, as matrix products: what prefill spends its time in.

With hundreds of rows a weight is read once for all of them, so the form is the one that compiles to a
single product of the stored types. Activations are quantized in the graph where the format says so:

  nvfp4        W4A4: x / s to E2M1 with an E4M3 scale for each 16 elements, s = max|x| of the row / (6 · 448)
  fp8          W8A8: x / s to E4M3, s = max|x| of the row / 448
  w4a16_nvfp4  the weight dequantized to BF16, exactly, once a call
  bf16         as stored

A scale for each row needs no calibration and keeps a row's result free of what other rows hold, so
padding changes nothing. Products are BF16 with float32 sums; where every state of the model is float32
they are float32. One-token entry points compute weight-only, so W4A4 and W8A8 differ from them by the
quantization of activations. A linear whose rows are no more than `FEW_ROWS` keeps the one-token form.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as onnx

from n3c.backends.onnx.emitter import DenseWeight, Emitter, Fp8Weight, Nvfp4Weight, Weight
from n3c.backends.onnx.forms import is_matrix_product
from n3c.ir.formats import E2M1_MAX, E4M3_MAX, NVFP4_BLOCK
from n3c.ir.program import Node

from .linears import linear_sum, tensor_scale, unscaled

F8E4M3FN = 17
"""Of TRT_FP4DynamicQuantize's attribute scale_type."""


def linear(emitter: Emitter, node: Node) -> None:
    """y = x Wᵀ by Gemm, whose second operand may be transposed without a copy; for few rows by a sum."""
    g = emitter.graph
    x = node["x"]
    if emitter.rendering == "engine" and not is_matrix_product(node, emitter.dims):
        linear_sum(emitter, node)
        return
    rows = g.node("Reshape", emitter.get(x), g.i64(-1, emitter.sizes(x)[-1]))
    y = _product(emitter, rows, emitter.weight(node["weight"]), stacked=False)
    emitter.bind(node.results[0], g.node("Reshape", y, g.i64(*emitter.sizes(node.results[0]))))


def experts(emitter: Emitter, node: Node) -> None:
    """Every expert over every row, then the sum with the routing weights, which are 0 where it was not chosen."""
    g = emitter.graph
    batch, tokens, width = emitter.sizes(node["x"])
    rows = g.node("Reshape", emitter.operand(node, "x"), g.i64(1, batch * tokens, width))
    up, down = (emitter.weight(weight) for weight in node.weights)
    positive = g.node("Relu", _product(emitter, rows, up, stacked=True))
    y = _product(emitter, g.node("Mul", positive, positive), down, stacked=True)
    count = emitter.sizes(node["up"])[0]
    indices, weights = (g.node("Unsqueeze", emitter.operand(node, name), g.i64(-1)) for name in ("indices", "weights"))
    hit = g.node("Equal", indices, g.constant(np.arange(count)))
    dense = g.node("ReduceSum", g.node("Where", hit, weights, g.f32(0.0)), g.i64(2), keepdims=0)
    column = g.node("Transpose", g.node("Reshape", dense, g.i64(batch * tokens, count, 1)), perm=[1, 0, 2])
    total = g.node("ReduceSum", g.node("Mul", y, column), g.i64(0), keepdims=0)
    emitter.bind(node.results[0], g.node("Reshape", total, g.i64(batch, tokens, width)))


def _product(emitter: Emitter, x: onnx.Value, weight: Weight, *, stacked: bool) -> onnx.Value:
    """Return x wᵀ with all scales, in float32: [T, K] by [N, K], or with `stacked` [1 or E, T, K] by [E, N, K]."""
    g = emitter.graph
    row_scale: onnx.Value | None = None
    match weight:
        case Nvfp4Weight(w4a4=True, packed=False, packed_scale=False):
            row_scale, left = _in_fp4(emitter, x)
            right = _from_fp4(emitter, weight.codes, weight.scale)
        case Fp8Weight(packed=False):
            row_scale, left = _in_fp8(emitter, x)
            right = g.node("DequantizeLinear", weight.codes, g.f32(1.0))
        case Nvfp4Weight(packed=False, packed_scale=False):
            left, right = emitter.activation(x), _from_fp4(emitter, weight.codes, weight.scale)
        case DenseWeight(is_f32=False) if not emitter.wide:
            left, right = emitter.activation(x), weight.tensor
        case _:
            left, right = emitter.activation(x), emitter.activation(unscaled(emitter, weight))
    if stacked:
        y = g.node("MatMul", left, g.node("Transpose", right, perm=[0, 2, 1]))
    else:
        y = g.node("Gemm", left, right, transB=1)
    if not (emitter.wide or (isinstance(weight, Fp8Weight) and not weight.packed)):
        y = g.node("Cast", y, to=onnx.DataType.FLOAT)
    scale = tensor_scale(weight)
    if scale is not None:
        scale = g.node("Unsqueeze", scale, g.i64(-1, -2)) if stacked else scale
        y = g.node("Mul", y, scale if row_scale is None else g.node("Mul", row_scale, scale))
    return y


def _row_scale(emitter: Emitter, x: onnx.Value, largest: float) -> onnx.Value:
    """Return what divides each row so that its largest value becomes `largest`; of a row of zeros 1e-20 / `largest`."""
    g = emitter.graph
    peak = g.node("ReduceMax", g.node("Abs", x), g.i64(-1), keepdims=1)
    return g.node("Mul", g.node("Max", peak, g.f32(1e-20)), g.f32(1 / largest))


def _in_fp8(emitter: Emitter, x: onnx.Value) -> tuple[onnx.Value, onnx.Value]:
    """Return the scale of each row, and the rows as E4M3 values."""
    g = emitter.graph
    scale = _row_scale(emitter, x, E4M3_MAX)
    one = g.f32(1.0)
    codes = g.node("QuantizeLinear", g.node("Div", x, scale), one, output_dtype=onnx.DataType.FLOAT8E4M3FN)
    return scale, g.node("DequantizeLinear", codes, one)


def _in_fp4(emitter: Emitter, x: onnx.Value) -> tuple[onnx.Value, onnx.Value]:
    """Return the scale of each row, and the rows as E2M1 values with E4M3 scales of blocks.

    TensorRT takes the scale of the whole tensor as a constant only, so it is 1.
    """
    g = emitter.graph
    scale = _row_scale(emitter, x, E2M1_MAX * E4M3_MAX)
    operands = (emitter.activation(g.node("Div", x, scale)), _one(emitter))
    attributes = {"axis": -1, "block_size": NVFP4_BLOCK, "scale_type": F8E4M3FN}
    codes, scales = g.nodes_results("TRT_FP4DynamicQuantize", operands, 2, "trt", attributes)
    return scale, _from_fp4(emitter, codes, scales)


def _from_fp4(emitter: Emitter, codes: onnx.Value, scales: onnx.Value) -> onnx.Value:
    """Return codes times scales: 6 significant bits, so exact in BF16 too."""
    g = emitter.graph
    wide = g.node("DequantizeLinear", scales, _one(emitter))
    return g.node("DequantizeLinear", codes, wide, axis=-1, block_size=NVFP4_BLOCK)


def _one(emitter: Emitter) -> onnx.Value:
    """Return 1 in the type of the products."""
    return emitter.graph.constant(np.array(1, np.float32 if emitter.wide else ml_dtypes.bfloat16))
