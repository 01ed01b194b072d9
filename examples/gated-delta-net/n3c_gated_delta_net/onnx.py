"""The ops in standard ops of ONNX: matrix products over pieces of a few tokens, so nothing loops.

In a piece of Q tokens with cᵢ = Σⱼ≤ᵢ gⱼ, every token corrects what those before it left: with
L = β (k̂ k̂ᵀ) exp(cᵢ - cⱼ) below the diagonal, u = (1 + L)⁻¹ β (v - exp(c) k̂ S) are the corrections, and
y = exp(c) q̂ S + (q̂ k̂ᵀ exp(cᵢ - cⱼ), diagonal included) u, S' = exp(c_Q) S + (exp(c_Q - c) k̂)ᵀ u.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import onnx_ir as onnx

from n3c.backends.onnx.dtypes import ONNX_DTYPES
from n3c.backends.onnx.emitter import Emitter, integer, number
from n3c.backends.onnx.spellings.elementwise import silu
from n3c.ir.program import Node
from n3c.ir.types import DType

EPS = 1e-6
PIECE = 16
"""Tokens of a piece. Powers of L may reach C(Q - 1, Q / 2): 6,435, and beyond float32 for pieces of 64."""


def split_groups(emitter: Emitter, node: Node) -> None:
    """Cut [..., groups, Σ sizes] along its last dim, and join what belongs together."""
    g, groups = emitter.graph, integer(node, "groups")
    sizes = cast("tuple[int, ...]", node.attributes["sizes"])
    batch, tokens, _ = emitter.sizes(node["x"])
    grouped = g.node("Reshape", emitter.operand(node, "x"), g.i64(batch, tokens, groups, sum(sizes)))
    pieces = g.nodes_results("Split", [grouped, g.i64(*sizes)], len(sizes), "", {"axis": -1})
    joined = [
        g.node("Reshape", piece, g.i64(batch, tokens, groups * size)) for piece, size in zip(pieces, sizes, strict=True)
    ]
    emitter.bind_results(node, joined)


def norm_then_gate(emitter: Emitter, node: Node) -> None:
    """RMSNormalization over each head, then a product with the gate."""
    g = emitter.graph
    batch, tokens, width = emitter.sizes(node["x"])
    (of_head,) = emitter.sizes(node["weight"])
    heads = g.node("Reshape", emitter.operand(node, "x"), g.i64(batch, tokens, width // of_head, of_head))
    square = g.node("ReduceMean", g.node("Mul", heads, heads), g.i64(-1), keepdims=1)
    length = g.node("Sqrt", g.node("Add", square, g.f32(number(node, "eps"))))
    normed = g.node("Mul", g.node("Div", heads, length), emitter.f32(node["weight"]))
    normed = g.node("Reshape", normed, g.i64(batch, tokens, width))
    emitter.bind(node.results[0], g.node("Mul", normed, silu(emitter, emitter.operand(node, "gate"))))


def gated_delta_update(emitter: Emitter, node: Node) -> None:
    """Pieces of `PIECE` tokens, each from the state that the one before left."""
    rule = _Rule.of(emitter, node)
    g, state = emitter.graph, node["state"]
    operands = rule.operands()
    memory, outputs = emitter.f32(state), list[onnx.Value]()
    for start in range(0, rule.tokens, PIECE):
        end = min(start + PIECE, rule.tokens)
        cut = [rule.cut(operand, start, end) for operand in operands]
        y, memory = rule.piece(cut, memory, end - start)
        outputs.append(y)
    y = outputs[0] if len(outputs) == 1 else g.node("Concat", *outputs, axis=2)
    y = g.node("Reshape", g.node("Transpose", y, perm=[0, 2, 1, 3]), g.i64(rule.batch, rule.tokens, rule.width))
    if state.type.dtype is not DType.F32:
        memory = g.node("Cast", memory, to=ONNX_DTYPES[state.type.dtype])
    emitter.bind_results(node, [y, memory])


@dataclass(frozen=True, slots=True)
class _Rule:
    """One `gated_delta_update`."""

    emitter: Emitter
    node: Node
    batch: int
    tokens: int
    width: int
    heads: int
    of_keys: int
    """Hk."""
    key_dim: int
    value_dim: int

    @classmethod
    def of(cls, emitter: Emitter, node: Node) -> _Rule:
        batch, tokens, width = emitter.sizes(node["v"])
        _, heads, key_dim, value_dim = emitter.sizes(node["state"])
        return cls(emitter, node, batch, tokens, width, heads, integer(node, "num_key_heads"), key_dim, value_dim)

    def operands(self) -> tuple[onnx.Value, ...]:
        """Return q̂ and k̂ [B, Hv, S, Dk], v [B, Hv, S, Dv], g and β [B, Hv, S, 1]; g and β are 0 beyond the counts."""
        g, emitter, node = self.emitter.graph, self.emitter, self.node
        query = g.node("Mul", self.unit("q"), g.f32(self.key_dim**-0.5))
        value = self.by_head(emitter.operand(node, "v"), self.heads, self.value_dim)
        step = g.node("Softplus", g.node("Add", emitter.operand(node, "a"), emitter.operand(node, "dt_bias")))
        decay = g.node("Mul", step, emitter.operand(node, "A"))
        strength = g.node("Sigmoid", emitter.operand(node, "b"))
        counts = node.get("counts")
        if counts is not None:
            place = g.constant(np.arange(self.tokens).reshape(1, -1, 1))
            counted = g.node("Less", place, g.node("Unsqueeze", emitter.get(counts), g.i64(1, 2)))
            decay, strength = (g.node("Where", counted, t, g.f32(0.0)) for t in (decay, strength))
        return query, self.unit("k"), value, self.by_head(decay, self.heads, 1), self.by_head(strength, self.heads, 1)

    def unit(self, name: str) -> onnx.Value:
        """Return queries or keys of length 1, each for every value head that reads it: [B, Hv, S, Dk]."""
        g, shared = self.emitter.graph, self.heads // self.of_keys
        x = self.by_head(self.emitter.operand(self.node, name), self.of_keys, self.key_dim)
        square = g.node("ReduceSum", g.node("Mul", x, x), g.i64(-1), keepdims=1)
        x = g.node("Div", x, g.node("Sqrt", g.node("Add", square, g.f32(EPS))))
        dims = (self.batch, self.of_keys, shared, self.tokens, self.key_dim)
        x = g.node("Expand", g.node("Unsqueeze", x, g.i64(2)), g.i64(*dims))
        return g.node("Reshape", x, g.i64(self.batch, self.heads, self.tokens, self.key_dim))

    def by_head(self, x: onnx.Value, heads: int, size: int) -> onnx.Value:
        """[B, S, heads·size] → [B, heads, S, size]."""
        g = self.emitter.graph
        return g.node("Transpose", g.node("Reshape", x, g.i64(self.batch, self.tokens, heads, size)), perm=[0, 2, 1, 3])

    def cut(self, x: onnx.Value, start: int, end: int) -> onnx.Value:
        g = self.emitter.graph
        return x if end - start == self.tokens else g.node("Slice", x, g.i64(start), g.i64(end), g.i64(2))

    def piece(self, operands: Sequence[onnx.Value], memory: onnx.Value, size: int) -> tuple[onnx.Value, onnx.Value]:
        """Return y [B, Hv, Q, Dv] of `size` tokens, and the state after them."""
        g, (query, key, value, decay, strength) = self.emitter.graph, operands

        def turned(x: onnx.Value) -> onnx.Value:
            return g.node("Transpose", x, perm=[0, 1, 3, 2])

        total = g.node("CumSum", decay, g.constant(np.array(2)))  # c [B, Hv, Q, 1]
        from_start = g.node("Exp", total)
        lower = g.constant(np.tril(np.ones((size, size), np.bool_)))
        gap = g.node("Where", lower, g.node("Sub", total, turned(total)), g.f32(-np.inf))
        fade = g.node("Exp", gap)  # exp(cᵢ - cⱼ), 0 above the diagonal

        recalled = g.node("MatMul", g.node("Mul", key, from_start), memory)
        wanted = g.node("Mul", g.node("Sub", value, recalled), strength)
        if size > 1:
            alike = g.node("Mul", g.node("MatMul", g.node("Mul", key, strength), turned(key)), fade)
            below = g.constant(np.tril(np.ones((size, size), np.float32), -1))
            wanted = self.solved(g.node("Mul", alike, below), wanted, size)
        seen = g.node("Mul", g.node("MatMul", query, turned(key)), fade)
        y = g.node("MatMul", g.node("Mul", query, from_start), memory)
        y = g.node("Add", y, g.node("MatMul", seen, wanted))

        last = g.node("Slice", total, g.i64(size - 1), g.i64(size), g.i64(2))  # [B, Hv, 1, 1]
        to_end = g.node("Exp", g.node("Sub", last, total))
        added = g.node("MatMul", turned(g.node("Mul", key, to_end)), wanted)
        return y, g.node("Add", g.node("Mul", memory, g.node("Exp", last)), added)

    def solved(self, below: onnx.Value, x: onnx.Value, size: int) -> onnx.Value:
        """Return (1 + L)⁻¹ x for L `below` the diagonal: Lᵠ = 0, so it is (1 - L) (1 + L²) (1 + L⁴) … x."""
        g = self.emitter.graph
        x = g.node("Sub", x, g.node("MatMul", below, x))
        power = below
        for _ in range(1, (size - 1).bit_length()):
            power = g.node("MatMul", power, power)
            x = g.node("Add", x, g.node("MatMul", power, x))
        return x
