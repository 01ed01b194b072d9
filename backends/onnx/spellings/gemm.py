"""Linears over several rows, as matrix products: what prefill spends its time in.

With many rows a weight is read once for all of them, so the form is the one that compiles to a single product of
the stored types. What is multiplied with is rounded where the program says so (`activations`):

  nvfp4, fp8            the stored type of the weight, times that of the activations, between float32 tensors: the same
                        numbers as a sum's. Stacks of experts in nvfp4: between BF16 ones, half the bytes
  w4a16_nvfp4           the weight dequantized to BF16, exactly, once a call
  bf16                  as stored

The last two are BF16 with float32 sums; where every state of the model is float32 they are float32.
"""

from __future__ import annotations

from math import prod

import onnx_ir as onnx

from n3c.backends.onnx.emitter import DenseWeight, Emitter, Fp8Weight, Nvfp4Weight, Rounded, Weight
from n3c.ir.program import Node

from . import activations
from .linears import linear_sum, product_scale, unscaled


def linear(emitter: Emitter, node: Node) -> None:
    """y = x Wᵀ by Gemm, whose second operand may be transposed without a copy, or by a sum."""
    g = emitter.graph
    x, width = node["x"], emitter.sizes(node["x"])[-1]
    if emitter.rendering == "engine" and (form := emitter.form(node)) != "product":
        linear_sum(emitter, node, form)
        return
    rounded, size = emitter.rounded(x), prod(emitter.sizes(x)[:-1])
    rows = (
        g.node("Reshape", emitter.get(x), g.i64(size, width))
        if rounded is None
        else activations.reshaped(emitter, rounded, size, width)
    )
    y = product(emitter, rows, emitter.weight(node["weight"]))
    emitter.bind(node.results[0], g.node("Reshape", y, g.i64(*emitter.sizes(node.results[0]))))


def product(emitter: Emitter, x: onnx.Value | Rounded, weight: Weight) -> onnx.Value:
    """Return x [T, K] times the transpose of the weight [N, K] with all scales, in float32."""
    g = emitter.graph
    wide = emitter.wide or isinstance(x, Rounded)
    left, right = _operands(emitter, x, weight, wide=wide)
    y = g.node("Gemm", left, right, transB=1)
    if not wide:
        y = g.node("Cast", y, to=onnx.DataType.FLOAT)
    scale = product_scale(emitter, weight, x.scale if isinstance(x, Rounded) else None)
    return y if scale is None else g.node("Mul", y, scale)


def stacked_product(emitter: Emitter, x: onnx.Value | Rounded, weight: Weight) -> tuple[onnx.Value, onnx.Value | None]:
    """Return x [E, C, K] times the transposes of a stack [E, N, K], [E, C, N], and what [E, 1, 1] to multiply it with.

    It is in the type of products, BF16 but for FP8. The weights stand on the left: there the scales of their blocks
    are tiled with fewer bytes.
    """
    g = emitter.graph
    left, right = _operands(emitter, x, weight, wide=emitter.wide)
    y = g.node("Transpose", g.node("MatMul", right, g.node("Transpose", left, perm=[0, 2, 1])), perm=[0, 2, 1])
    scale = product_scale(emitter, weight, x.scale if isinstance(x, Rounded) else None, _stacked(weight))
    return y, None if scale is None else g.node("Unsqueeze", scale, g.i64(-1, -2))


def _operands(
    emitter: Emitter, x: onnx.Value | Rounded, weight: Weight, *, wide: bool
) -> tuple[onnx.Value, onnx.Value]:
    """Return both operands in the type of the product; rounded ones in float32 if `wide`."""
    g = emitter.graph
    left = activations.values(emitter, x, wide=wide) if isinstance(x, Rounded) else emitter.activation(x)
    match weight:
        case Fp8Weight(packed=False) if isinstance(x, Rounded):  # in float32 it compiles to a product of FP8
            return left, g.node("DequantizeLinear", weight.codes, g.f32(1.0))
        case Nvfp4Weight(packed=False, packed_scale=False):
            return left, activations.from_fp4(emitter, weight.codes, weight.scale, wide=wide and isinstance(x, Rounded))
        case DenseWeight(is_f32=False) if not emitter.wide:
            return left, weight.tensor
        case _:
            return left, emitter.activation(unscaled(emitter, weight))


def _stacked(weight: Weight) -> int:
    """Return how many matrices a stack holds."""
    codes = weight.tensor if isinstance(weight, DenseWeight) else weight.codes
    assert codes.shape is not None and isinstance(codes.shape[0], int)  # of a graph input
    return codes.shape[0]
