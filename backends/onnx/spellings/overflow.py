"""Pairs of tokens and experts that no bucket holds, computed from the chosen experts' weights, in a Loop."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as onnx

from n3c.backends.onnx.emitter import Emitter, Rounded
from n3c.ir.program import Node

from . import activations, tables
from .experts import chosen_product

LISTED = 64
"""Pairs of a round of the Loop."""


@dataclass(frozen=True, slots=True)
class Pairs:
    """The pairs of a chunk."""

    x: onnx.Value
    """FLOAT [T, L]."""
    scale: tuple[onnx.Value, str] | None
    """By what x was divided, and the format that it is to be rounded to."""
    indices: onnx.Value
    """INT64 [T, K]."""
    weights: onnx.Value
    """FLOAT [T, K]."""
    fits: onnx.Value
    """BOOL [T, K]: whether a bucket holds the pair."""


def overflow(emitter: Emitter, node: Node, pairs: Pairs) -> onnx.Value:
    """Return the sum of the pairs that do not fit, [T, L]."""
    g = emitter.graph
    (batch, tokens, width), top_k = emitter.sizes(node["x"]), emitter.sizes(node["indices"])[-1]
    rows, total = batch * tokens, batch * tokens * top_k
    left = g.node("Cast", g.node("Not", g.node("Reshape", pairs.fits, g.i64(-1))), to=onnx.DataType.FLOAT)
    count = g.node("CumSum", left, g.constant(np.array(0)))
    size = -(-total // LISTED) * LISTED
    last = g.i64(size)
    place = g.node("Cast", g.node("Sub", count, g.f32(1.0)), to=onnx.DataType.INT64)
    place = g.node("Where", g.node("Reshape", pairs.fits, g.i64(-1)), last, place)
    nobody = g.node("Expand", g.i64(total), g.i64(size + 1))
    listed = g.node("ScatterElements", nobody, place, g.constant(np.arange(total)), axis=0)
    rounds = g.node("Div", g.node("Add", g.node("ReduceMax", count, keepdims=0), g.f32(LISTED - 1.0)), g.f32(LISTED))
    rounds = g.node("Cast", g.node("Floor", rounds), to=onnx.DataType.INT64)
    start = g.node("Expand", g.f32(0.0), g.i64(rows, width))

    def round_(index: onnx.Value, sums: onnx.Value) -> onnx.Value:
        where = g.node("Add", g.node("Mul", index, g.i64(LISTED)), g.i64(*range(LISTED)))
        pair = tables.rows(emitter, listed, where)
        inside = g.node("Min", pair, g.i64(total - 1))
        token = g.node("Div", inside, g.i64(top_k))
        expert, weight = (
            tables.rows(emitter, g.node("Reshape", value, g.i64(-1)), inside)
            for value in (pairs.indices, pairs.weights)
        )
        weight = g.node("Where", g.node("Less", pair, g.i64(total)), weight, g.f32(0.0))
        y = _computed(emitter, node, tables.rows(emitter, pairs.x, token), pairs.scale, expert)
        mine = g.node("Equal", g.constant(np.arange(rows).reshape(-1, 1)), token)
        share = g.node("Unsqueeze", g.node("Where", mine, weight, g.f32(0.0)), g.i64(-1))  # [T, P, 1]
        return g.node("Add", sums, g.node("ReduceSum", g.node("Mul", share, y), g.i64(1), keepdims=0))

    return g.loop(rounds, start, round_)


def _computed(
    emitter: Emitter, node: Node, x: onnx.Value, scale: tuple[onnx.Value, str] | None, expert: onnx.Value
) -> onnx.Value:
    """Return down relu²(up x) of the experts [P] for rows x [P, L]: as in decoding, of P sequences with one choice."""
    g = emitter.graph
    indices = g.node("Reshape", expert, g.i64(LISTED, 1, 1))
    x = g.node("Reshape", x, g.i64(LISTED, 1, 1, -1))
    x_scale = None
    if scale is not None:
        x, x_scale = (
            activations.values(emitter, Rounded(x, (LISTED, 1, 1, emitter.sizes(node["x"])[-1]), *scale)),
            scale[0],
        )
    inner = chosen_product(emitter, x, x_scale, node["up"], indices, (LISTED, 1, 1))
    positive = g.node("Relu", inner)
    active = g.node("Mul", positive, positive)
    if node.get("inner_scale") is not None:
        format_ = str(node.attributes["inner_format"])
        dims = (LISTED, 1, 1, emitter.sizes(node["up"])[1])
        rounded = activations.divided(emitter, active, dims, emitter.operand(node, "inner_scale"), format_)
        active, x_scale = activations.values(emitter, rounded), rounded.scale
    else:
        x_scale = None
    y = chosen_product(emitter, active, x_scale, node["down"], indices, (LISTED, 1, 1))
    return g.node("Reshape", y, g.i64(1, LISTED, -1))
