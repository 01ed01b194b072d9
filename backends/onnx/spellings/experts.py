"""Linears of the chosen experts: gather first, so that only their weights are read.

ONNX (and TensorRT) cannot gather FP4 values, and a gather of dequantized ones becomes a kernel of its
own that writes them out. So NVFP4 codes come as bytes: a byte is the index into two tables of 256
entries, of the value of its low and of its high nibble, and everything from the gather to the sum is
one kernel.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as onnx

from n3c.ir.ops import NVFP4_BLOCK
from n3c.ir.program import Node

from ..emitter import DenseWeight, Emitter, Nvfp4Weight, Weight
from ..graph import Array
from .linears import block_scales, tensor_scale, unscaled

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""Code → value."""


def nibble_tables() -> tuple[Array, Array]:
    """Return byte + 128 (a signed byte is the index) → value of its low and of its high nibble."""
    byte = np.arange(-128, 128) & 0xFF
    return E2M1[byte & 15], E2M1[byte >> 4]


def expand_experts(emitter: Emitter, node: Node) -> None:
    """Unsqueeze."""
    g = emitter.graph
    emitter.bind(node.results[0], g.node("Unsqueeze", emitter.operand(node, 0), g.i64(-2)))


def expert_linear(emitter: Emitter, node: Node) -> None:
    """y[b, s, r, n] = Σₖ x[b, s, r or 1, 1, k] · w[indices[b, s, r], n, k], times the expert's scale."""
    g = emitter.graph
    indices, weight = emitter.operand(node, 1), emitter.weight(node.operand(2))
    chosen = (*emitter.sizes(node.operand(1)), *emitter.sizes(node.operand(2))[1:])
    if isinstance(weight, Nvfp4Weight) and weight.packed:
        y = _packed(emitter, weight, indices, node, chosen)
    else:
        rows = _gathered(emitter, weight, indices)
        column = g.node("Unsqueeze", emitter.operand(node, 0), g.i64(-2))
        y = g.node("ReduceSum", g.node("Mul", column, rows), g.i64(-1), keepdims=0)
    scale = tensor_scale(weight)
    if scale is not None:
        y = g.node("Mul", y, g.node("Unsqueeze", g.node("Gather", scale, indices, axis=0), g.i64(-1)))
    emitter.bind(node.results[0], y)


def _gathered(emitter: Emitter, weight: Weight, indices: onnx.Value) -> onnx.Value:
    """Return the chosen experts' weights in float32, without scales of tensors."""
    g = emitter.graph
    if isinstance(weight, DenseWeight):
        return emitter.widened(g.node("Gather", weight.tensor, indices, axis=0), weight.is_f32)
    return g.node("Gather", unscaled(emitter, weight), indices, axis=0)


def _packed(
    emitter: Emitter, weight: Nvfp4Weight, indices: onnx.Value, node: Node, chosen: tuple[int, ...]
) -> onnx.Value:
    """Σ over blocks and bytes of (low · x[even] + high · x[odd]) · scale: codes are INT8 [E, N, K/2]."""
    g = emitter.graph
    *outer, width = chosen
    scales = g.node("Gather", block_scales(emitter, weight.scale), indices, axis=0)
    byte = g.node("Cast", g.node("Gather", weight.codes, indices, axis=0), to=onnx.DataType.INT32)
    index = g.node("Add", byte, g.constant(np.array(128, np.int32)))
    x = g.node("Unsqueeze", emitter.operand(node, 0), g.i64(-2))
    products = [
        g.node(
            "Mul",
            g.node("Gather", g.constant(table), index, axis=0),
            g.node("Slice", x, g.i64(first), g.i64(width), g.i64(-1), g.i64(2)),
        )
        for first, table in enumerate(nibble_tables())
    ]
    blocks = g.i64(*outer, width // NVFP4_BLOCK, NVFP4_BLOCK // 2)
    scaled = g.node("Mul", g.node("Reshape", g.node("Add", *products), blocks), g.node("Unsqueeze", scales, g.i64(-1)))
    return g.node("ReduceSum", scaled, g.i64(-2, -1), keepdims=0)


def combine_experts(emitter: Emitter, node: Node) -> None:
    """A product and a sum: z = Σᵣ weights[r] · y[r]."""
    g = emitter.graph
    weighted = g.node("Mul", emitter.operand(node, 0), g.node("Unsqueeze", emitter.operand(node, 1), g.i64(-1)))
    emitter.bind(node.results[0], g.node("ReduceSum", weighted, g.i64(-2), keepdims=0))
