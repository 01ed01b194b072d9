"""Attention of one token, in float32: its scores against keys, and the values weighted by their softmax.

Query heads that share keys are sums beside each other, which compile to one kernel with an output a head: it reads a
key once for all of them. A sum over positions would read values a position a lane, 256 bytes apart, and a sector of 32
bytes for each number: as a matrix product they are widened once, in the order in which they lie. docs/engine-forms.md
has the measurements.
"""

from __future__ import annotations

import onnx_ir as onnx

from n3c.backends.onnx.emitter import Emitter

MOST_HEADS = 32
"""Outputs of one kernel; with more the builder writes the keys to memory in float32 first."""


def scores(emitter: Emitter, q: onnx.Value, k: onnx.Value, heads: int) -> onnx.Value:
    """Return q k, [B, Hkv, G, L], of q [B, Hkv, G, P] and keys [B, Hkv, L, P]; G is `heads`."""
    g = emitter.graph
    if heads > MOST_HEADS:
        product = g.node("Mul", g.node("Unsqueeze", q, g.i64(3)), g.node("Unsqueeze", k, g.i64(2)))
        return g.node("ReduceSum", product, g.i64(4), keepdims=0)
    of_heads = [
        g.node("Unsqueeze", g.node("ReduceSum", g.node("Mul", row, k), g.i64(3), keepdims=0), g.i64(2))
        for row in g.split(q, heads, 2)
    ]
    return of_heads[0] if heads == 1 else g.node("Concat", *of_heads, axis=2)


def weighted(emitter: Emitter, share: onnx.Value, v: onnx.Value) -> onnx.Value:
    """Return share v, [B, Hkv, G, P], of shares [B, Hkv, G, L] and values [B, Hkv, L, P]."""
    return emitter.graph.node("MatMul", share, v)
