"""Experts over many tokens: every expert over the rows that chose it, in buckets. Nothing is dropped.

The pairs of a token and an expert are ranked within their expert, in the order of tokens. Those of the first C ranks
lie in the expert's bucket of C rows, so that each projection is one batched product that reads every weight once.
Pairs beyond are listed and computed as in decoding (`overflow`): none for most calls, in the worst nearly all. Where
buckets would be as large as the chunk, a bucket is the chunk, and nothing is left over.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as onnx

from n3c.backends.onnx.emitter import Emitter, Rounded
from n3c.backends.onnx.entry_forms import bucket_rows
from n3c.ir.program import Node

from . import activations, tables
from .gemm import stacked_product
from .overflow import Pairs, overflow


def experts(emitter: Emitter, node: Node) -> None:
    """y = Σₖ weights[k] · down[e] relu²(up[e] x), e = indices[k]."""
    g = emitter.graph
    batch, tokens, width = emitter.sizes(node["x"])
    count, top_k = emitter.sizes(node["up"])[0], emitter.sizes(node["indices"])[-1]
    rows = batch * tokens
    capacity = bucket_rows(rows, top_k, count)
    x, scale = _rows(emitter, node, rows, width)
    indices, weights = (g.node("Reshape", emitter.operand(node, name), g.i64(rows, top_k)) for name in _CHOICE)
    rank = _ranks(emitter, indices, count)
    fits = g.node("Less", rank, g.i64(capacity))
    place = g.node("Where", fits, g.node("Add", g.node("Mul", indices, g.i64(capacity)), rank), g.i64(count * capacity))

    token = g.constant(np.repeat(np.arange(rows), top_k))
    empty = g.node("Expand", g.i64(0), g.i64(count * capacity + 1))  # what no pair lies in is computed and not read
    filled = g.node("ScatterElements", empty, g.node("Reshape", place, g.i64(-1)), token, axis=0)
    order = g.node("Reshape", g.node("Slice", filled, g.i64(0), g.i64(count * capacity)), g.i64(count, capacity))
    row = tables.rows(emitter, x, order)  # [E, C, L]
    bucket = row if scale is None else Rounded(row, (count, capacity, width), *scale)
    active = _active(emitter, node, bucket, capacity)
    y, y_scale = stacked_product(emitter, active, emitter.weight(node["down"]))

    flat = g.node("Reshape", y, g.i64(count * capacity, width))
    own = tables.rows(emitter, flat, g.node("Min", place, g.i64(count * capacity - 1)))  # [T, K, L]
    share = g.node("Where", fits, weights, g.f32(0.0))
    if y_scale is not None:
        share = g.node("Mul", share, tables.rows(emitter, g.node("Reshape", y_scale, g.i64(count)), indices))
    weighted = g.node("Mul", g.node("Cast", own, to=onnx.DataType.FLOAT), g.node("Unsqueeze", share, g.i64(-1)))
    total = g.node("ReduceSum", weighted, g.i64(1), keepdims=0)
    if capacity < rows:
        pairs = Pairs(x, scale, indices, weights, fits)
        total = g.node("Add", total, overflow(emitter, node, pairs))
    emitter.bind(node.results[0], g.node("Reshape", total, g.i64(batch, tokens, width)))


_CHOICE = ("indices", "weights")


def _rows(emitter: Emitter, node: Node, rows: int, width: int) -> tuple[onnx.Value, tuple[onnx.Value, str] | None]:
    """Return x [T, L], and where it is to be rounded, by what it was divided for that, and the format."""
    g, rounded = emitter.graph, emitter.rounded(node["x"])
    if rounded is None:
        return g.node("Reshape", emitter.operand(node, "x"), g.i64(rows, width)), None
    return activations.reshaped(emitter, rounded, rows, width).divided, (rounded.scale, rounded.format)


def _ranks(emitter: Emitter, indices: onnx.Value, count: int) -> onnx.Value:
    """Return how many tokens before it chose the expert of each pair, i64 [T, K]."""
    g = emitter.graph
    hit = g.node("Equal", g.node("Unsqueeze", indices, g.i64(-1)), g.constant(np.arange(count)))
    hits = g.node("ReduceSum", g.node("Cast", hit, to=onnx.DataType.FLOAT), g.i64(1), keepdims=0)  # [T, E]
    so_far = g.node("GatherElements", g.node("CumSum", hits, g.constant(np.array(0))), indices, axis=1)
    return g.node("Cast", g.node("Sub", so_far, g.f32(1.0)), to=onnx.DataType.INT64)


def _active(emitter: Emitter, node: Node, x: onnx.Value | Rounded, capacity: int) -> onnx.Value | Rounded:
    """Return relu²(up x) [E, C, I], to be rounded where the op says so: scales are squared beside it."""
    g = emitter.graph
    inner, scale = stacked_product(emitter, x, emitter.weight(node["up"]))
    positive = g.node("Relu", inner)
    # squared in the type of the product, which else writes the wider one
    active = g.node("Cast", g.node("Mul", positive, positive), to=onnx.DataType.FLOAT)
    factor = None if scale is None else g.node("Mul", scale, scale)
    if node.get("inner_scale") is None:
        return active if factor is None else g.node("Mul", active, factor)
    inner_scale, format_ = emitter.operand(node, "inner_scale"), str(node.attributes["inner_format"])
    experts, width, _ = emitter.sizes(node["up"])
    reciprocal = g.node("Reciprocal", inner_scale)
    divided = g.node("Mul", active, reciprocal if factor is None else g.node("Mul", factor, reciprocal))
    return Rounded(divided, (experts, capacity, width), inner_scale, format_)
