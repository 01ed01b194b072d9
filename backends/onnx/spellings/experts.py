"""Linears of the chosen experts: gather first, so that only their weights are read.

ONNX (and TensorRT) cannot gather FP4 values, and a gather of dequantized ones becomes a kernel of its
own that writes them out. So NVFP4 codes are bound as bytes, by blocks, and each half of a byte is looked up;
everything from the gather to the sum is one kernel.
"""

from __future__ import annotations

from math import prod

import numpy as np
import onnx_ir as onnx

from n3c.backends.onnx.emitter import DenseWeight, Emitter, Fp8Weight, Nvfp4Weight, Weight
from n3c.ir.program import Node, Value

from . import activations, tables
from .linears import block_scales, in_planes, nvfp4_weight, product_scale, unscaled
from .router import LEAST


def expand_experts(emitter: Emitter, node: Node) -> None:
    """Unsqueeze."""
    g = emitter.graph
    emitter.bind(node.results[0], g.node("Unsqueeze", emitter.operand(node, "x"), g.i64(-2)))


def expert_linear(emitter: Emitter, node: Node) -> None:
    """y[b, s, r, n] = Σₖ x[b, s, r or 1, 1, k] · w[indices[b, s, r], n, k], times the expert's scale."""
    x, x_scale = activations.read(emitter, node["x"], in_planes=in_planes(emitter.weight(node["weight"])))
    indices, chosen = emitter.operand(node, "indices"), emitter.sizes(node["indices"])
    if emitter.rendering == "engine" and emitter.form(node) == "by_expert":
        y = _by_expert(emitter, node, x, x_scale)
    else:
        y = chosen_product(emitter, x, x_scale, node["weight"], indices, chosen)
    emitter.bind(node.results[0], y)


def _by_expert(emitter: Emitter, node: Node, x: onnx.Value, x_scale: onnx.Value | None) -> onnx.Value:
    """Return the products of all pairs of a token and an expert, computed in the order of experts.

    Those that chose the same expert come one after the other, so that its weights leave memory once.
    """
    g = emitter.graph
    chosen, (*_, rows, width) = emitter.sizes(node["indices"]), emitter.sizes(node["x"])
    pairs, each = prod(chosen), prod(chosen) if rows > 1 else prod(chosen[:-1])
    experts, order, place = _order(emitter, emitter.operand(node, "indices"), pairs)
    row = order if each == pairs else g.node("Div", order, g.i64(chosen[-1]))
    sorted_x = tables.rows(emitter, g.node("Reshape", x, g.i64(each, width)), row)
    y = chosen_product(emitter, sorted_x, x_scale, node["weight"], experts, (pairs,))
    outputs = emitter.sizes(node.results[0])
    return g.node(
        "Reshape", tables.rows(emitter, g.node("Reshape", y, g.i64(pairs, outputs[-1])), place), g.i64(*outputs)
    )


def _order(emitter: Emitter, indices: onnx.Value, pairs: int) -> tuple[onnx.Value, onnx.Value, onnx.Value]:
    """Return the experts of all pairs in order, which pair each is of, and where each pair has gone, all [P].

    INT32 is sorted, as what kernels gather with: from other types each would cast the index again.
    """
    g = emitter.graph

    def make() -> tuple[onnx.Value, onnx.Value, onnx.Value]:
        flat = g.node("Cast", g.node("Reshape", indices, g.i64(pairs)), to=onnx.DataType.INT32)
        experts, order = g.nodes_results("TopK", (flat, g.i64(pairs)), 2, "", {"axis": -1})
        nowhere = g.node("Expand", g.i64(0), g.i64(pairs))
        place = g.node("ScatterElements", nowhere, order, g.constant(np.arange(pairs)), axis=0)
        return g.node("Cast", experts, to=onnx.DataType.INT64), order, place

    experts, order, place = emitter.shared_many(("by expert", id(indices)), make)
    return experts, order, place


def chosen_product(
    emitter: Emitter,
    x: onnx.Value,
    x_scale: onnx.Value | None,
    value: Value,
    indices: onnx.Value,
    dims: tuple[int, ...],
) -> onnx.Value:
    """Return the products of x [..., R or 1, K] with weights [E, N, K] of experts `indices`, of `dims` [..., R]."""
    g, weight = emitter.graph, _gatherable(emitter, value)
    chosen = (*dims, *emitter.sizes(value)[1:])
    if emitter.rendering == "float32":
        matrices = _gathered(emitter, weight, indices)
        y = g.node("Squeeze", g.node("MatMul", matrices, g.node("Unsqueeze", x, g.i64(-1))), g.i64(-1))
    elif isinstance(weight, Nvfp4Weight) and weight.packed:
        scales = block_scales(emitter, weight, indices)
        codes = tables.rows(emitter, weight.codes, indices)
        y = tables.e2m1_product(emitter, g.node("Unsqueeze", x, g.i64(-2)), codes, scales, chosen)
    else:
        product = g.node("Mul", g.node("Unsqueeze", x, g.i64(-2)), _gathered(emitter, weight, indices))
        y = g.node("ReduceSum", product, g.i64(-1), keepdims=0)
    scale = product_scale(emitter, weight, x_scale, emitter.sizes(value)[0])
    if scale is None:
        return y
    return g.node("Mul", y, g.node("Unsqueeze", tables.rows(emitter, scale, indices), g.i64(-1)))


def _gatherable(emitter: Emitter, value: Value) -> Weight:
    """Return a weight as its rows can be gathered: of NVFP4 the bytes."""
    weight = emitter.weight(value)
    return nvfp4_weight(*map(emitter.view, value.stored)) if isinstance(weight, Nvfp4Weight) else weight


def _gathered(emitter: Emitter, weight: Weight, indices: onnx.Value) -> onnx.Value:
    """Return the chosen experts' weights in float32, without scales of tensors."""
    if isinstance(weight, DenseWeight):
        return emitter.widened(tables.rows(emitter, weight.tensor, indices), weight.is_f32)
    if isinstance(weight, Fp8Weight) and weight.packed:
        return tables.e4m3(emitter, tables.rows(emitter, weight.codes, indices))
    return tables.rows(emitter, unscaled(emitter, weight), indices)


def combine_experts(emitter: Emitter, node: Node) -> None:
    """A product and a sum: z = Σᵣ weights[r] · y[r].

    Weights that are to be divided by their sum are summed beside it, in the same kernel, and the result is divided: a
    factor of a row that a linear in turn multiplies with its result.
    """
    g = emitter.graph
    y, weights = emitter.operand(node, "y"), emitter.operand(node, "weights")
    share = emitter.share(weights) if emitter.rendering == "engine" else None
    if share is None:
        emitter.bind(node.results[0], _weighted(emitter, y, weights))
        return
    z, column = _weighted(emitter, y, share.of), g.node("Unsqueeze", share.of, g.i64(-1))
    wide = g.node("Expand", column, g.i64(*emitter.sizes(node["y"])))
    total = g.node("Add", g.node("ReduceSum", wide, g.i64(-2), keepdims=0), g.f32(LEAST))
    factor = g.node("Div", g.f32(share.factor), total)
    made = g.node("Mul", z, factor)
    emitter.bind(node.results[0], made)
    first = (factor, g.i64(1, emitter.sizes(node["y"])[-1] - 1))
    emitter.bind_scaled(made, z, g.nodes_results("Split", first, 2, "", {"axis": -1})[0])


def _weighted(emitter: Emitter, y: onnx.Value, weights: onnx.Value) -> onnx.Value:
    """Return Σᵣ weights[r] · y[r]."""
    g = emitter.graph
    return g.node("ReduceSum", g.node("Mul", y, g.node("Unsqueeze", weights, g.i64(-1))), g.i64(-2), keepdims=0)
