"""The router: sigmoid scores, selection with a correction bias, weights from the scores without it."""

from __future__ import annotations

import numpy as np
import onnx_ir as onnx

from n3c.backends.onnx.emitter import Emitter, Share, integer, number
from n3c.ir.program import Node

LEAST = 1e-20
"""Added to the sum of weights, by which they are divided."""


def route(emitter: Emitter, node: Node) -> None:
    """Sigmoid, TopK and GatherElements; groups that may not be chosen from are set to -inf before."""
    g = emitter.graph
    top_k, groups, factor = integer(node, "top_k"), integer(node, "n_group"), number(node, "scaling_factor")
    scores = g.node("Sigmoid", emitter.operand(node, "logits"))
    choice = g.node("Add", scores, emitter.operand(node, "bias"))
    if groups > 1:
        choice = _within_groups(emitter, node, choice, groups)
    _, indices = g.nodes_results("TopK", (choice, g.i64(top_k)), 2, "", {"axis": -1})
    chosen = weights = g.node("GatherElements", scores, indices, axis=2)
    if node.attributes["norm_topk_prob"]:
        total = g.node("ReduceSum", weights, g.i64(-1), keepdims=1)
        weights = g.node("Div", weights, g.node("Add", total, g.f32(LEAST)))
    if factor != 1.0:
        weights = g.node("Mul", weights, g.f32(factor))
    emitter.bind_results(node, [indices, weights])
    if node.attributes["norm_topk_prob"]:
        emitter.bind_share(weights, Share(chosen, factor))


def _within_groups(emitter: Emitter, node: Node, choice: onnx.Value, groups: int) -> onnx.Value:
    """Set to -inf what is not in the `topk_group` groups whose two largest choices have the largest sum."""
    g = emitter.graph
    kept = integer(node, "topk_group")
    *outer, experts = emitter.sizes(node["logits"])
    grouped = g.node("Reshape", choice, g.i64(*outer, groups, experts // groups))
    best, _ = g.nodes_results("TopK", (grouped, g.i64(2)), 2, "", {"axis": -1})
    score = g.node("ReduceSum", best, g.i64(-1), keepdims=0)
    _, chosen = g.nodes_results("TopK", (score, g.i64(kept)), 2, "", {"axis": -1})
    ids = g.constant(np.arange(groups, dtype=np.int64))
    hit = g.node("Cast", g.node("Equal", g.node("Unsqueeze", chosen, g.i64(-1)), ids), to=onnx.DataType.FLOAT)
    allowed = g.node("Cast", g.node("ReduceMax", hit, g.i64(-2), keepdims=0), to=onnx.DataType.BOOL)
    masked = g.node("Where", g.node("Unsqueeze", allowed, g.i64(-1)), grouped, g.f32(-np.inf))
    return g.node("Reshape", masked, g.i64(*outer, experts))
