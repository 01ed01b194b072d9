"""Mamba-2 with states: the convolution over a window, and the SSD recurrence of one token or in pieces."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as onnx

from n3c.backends.onnx.dtypes import ONNX_DTYPES
from n3c.backends.onnx.emitter import Emitter, integer
from n3c.ir.program import Node, Value
from n3c.ir.types import DType

from .elementwise import rows_of, silu

FEW_TOKENS = 8
"""Tokens of a piece up to which the state is read and written by sums rather than by matrix products."""


def _stored(emitter: Emitter, x: onnx.Value, state: Value) -> onnx.Value:
    """Return float32 x in the type in which `state` is stored."""
    if state.type.dtype is DType.F32:
        return x
    return emitter.graph.node("Cast", x, to=ONNX_DTYPES[state.type.dtype])


def causal_conv1d_update(emitter: Emitter, node: Node) -> None:
    """One token: append it to the window [B, C, W - 1], sum W columns, keep the last W - 1. Else in rows."""
    g = emitter.graph
    _, tokens, _ = emitter.sizes(node["x"])
    channels, _, width = emitter.sizes(node["weight"])
    window, bias = node["window"], node.get("bias")
    weight = g.node("Reshape", emitter.f32(node["weight"]), g.i64(channels, width))
    if tokens > 1 or node.get("counts") is not None:
        _convolved_rows(emitter, node, weight)
        return
    new = g.node("Transpose", emitter.operand(node, "x"), perm=[0, 2, 1])
    columns = g.node("Concat", emitter.f32(window), new, axis=2)
    y = g.node("ReduceSum", g.node("Mul", columns, weight), g.i64(2), keepdims=0)
    y = y if bias is None else g.node("Add", y, emitter.f32(bias))
    kept = g.node("Slice", columns, g.i64(1), g.i64(width), g.i64(2))
    emitter.bind_results(node, [g.node("Unsqueeze", silu(emitter, y), g.i64(1)), _stored(emitter, kept, window)])


def _convolved_rows(emitter: Emitter, node: Node, weight: onnx.Value) -> None:
    """Window and tokens as rows [B, W - 1 + S, C]: W shifted products; the new window begins at row counts[b]."""
    g = emitter.graph
    batch, tokens, channels = emitter.sizes(node["x"])
    _, _, kept = emitter.sizes(node["window"])
    window, bias, counts = node["window"], node.get("bias"), node.get("counts")
    before = g.node("Transpose", emitter.f32(window), perm=[0, 2, 1])
    rows = g.node("Concat", before, emitter.operand(node, "x"), axis=1)
    y: onnx.Value | None = None
    for j, column in enumerate(g.split(weight, kept + 1, 1)):
        tap = g.node("Reshape", column, g.i64(channels))
        product = g.node("Mul", g.node("Slice", rows, g.i64(j), g.i64(j + tokens), g.i64(1)), tap)
        y = product if y is None else g.node("Add", y, product)
    assert y is not None
    y = y if bias is None else g.node("Add", y, emitter.f32(bias))
    if counts is None:
        after = g.node("Slice", rows, g.i64(tokens), g.i64(tokens + kept), g.i64(1))
    else:
        places = g.node("Add", g.node("Unsqueeze", emitter.get(counts), g.i64(1)), g.i64(*range(kept)))
        after = rows_of(emitter, rows, (batch, kept + tokens, channels), places)
    after = g.node("Transpose", after, perm=[0, 2, 1])
    emitter.bind_results(node, [silu(emitter, y), _stored(emitter, after, window)])


def ssd_update(emitter: Emitter, node: Node) -> None:
    """One token by the recurrence; more in pieces of at most `chunk_size`, all at once but for the states between."""
    ssd, state, tokens = _Ssd.of(emitter, node), node["state"], emitter.sizes(node["x"])[1]
    step, h = ssd.step(tokens), emitter.f32(state)
    if tokens == 1 and node.get("counts") is None:
        y, h = ssd.token(step, h)
    else:
        count = -(-tokens // integer(node, "chunk_size"))
        y, h = ssd.pieces(step, h, count, tokens)
    emitter.bind_results(node, [y, _stored(emitter, h, state)])


@dataclass(frozen=True, slots=True)
class _Ssd:
    """One `ssd_update`. Sizes as in the state [B, H, P, N]; head i reads group i // (H / G) of B and C."""

    emitter: Emitter
    node: Node
    batch: int
    heads: int
    channels: int
    width: int
    groups: int

    @classmethod
    def of(cls, emitter: Emitter, node: Node) -> _Ssd:
        batch, heads, channels, width = emitter.sizes(node["state"])
        return cls(emitter, node, batch, heads, channels, width, integer(node, "n_groups"))

    def operand(self, name: str) -> onnx.Value:
        return self.emitter.operand(self.node, name)

    def step(self, tokens: int) -> onnx.Value:
        """Return δ = softplus(dt + dt_bias), [B, S, H]; 0 after the tokens that count, so that they change nothing."""
        g, counts = self.emitter.graph, self.node.get("counts")
        step = g.node("Softplus", g.node("Add", self.operand("dt"), self.operand("dt_bias")))
        if counts is None:
            return step
        place = g.constant(np.arange(tokens).reshape(1, -1, 1))
        valid = g.node("Less", place, g.node("Unsqueeze", self.emitter.get(counts), g.i64(1, 2)))
        return g.node("Where", valid, step, g.f32(0.0))

    def token(self, step: onnx.Value, h: onnx.Value) -> tuple[onnx.Value, onnx.Value]:
        """Return y [B, 1, H·P] of one token and the state after it, from the state h before it.

        With a = exp(δA): h' = a h + δx ⊗ B and y = a (h·C) + δx (B·C) + D x, h as [B, G, H/G, P, N]. The y of the
        definition, h'·C + D x, multiplied out: so both read the old state, in one kernel, and the new state is
        written but not read back.
        """
        g, share = self.emitter.graph, self.heads // self.groups

        def grouped(value: onnx.Value, *dims: int) -> onnx.Value:
            return g.node("Reshape", value, g.i64(self.batch, self.groups, *dims))

        decay = grouped(g.node("Exp", g.node("Mul", step, self.operand("A"))), share, 1, 1)
        h = grouped(h, share, self.channels, self.width)
        x = grouped(self.operand("x"), share, self.channels, 1)
        key, query = (grouped(self.operand(name), 1, 1, self.width) for name in ("B", "C"))
        skip = g.node("Reshape", self.operand("D"), g.i64(1, self.groups, share, 1, 1))

        scaled = g.node("Mul", x, grouped(step, share, 1, 1))  # δx
        read = g.node("ReduceSum", g.node("Mul", h, query), g.i64(-1), keepdims=1)  # h·C
        match = g.node("ReduceSum", g.node("Mul", key, query), g.i64(-1), keepdims=1)  # B·C
        y = g.node("Add", g.node("Mul", read, decay), g.node("Mul", scaled, match))
        y = g.node("Add", y, g.node("Mul", x, skip))
        after = g.node("Add", g.node("Mul", h, decay), g.node("Mul", scaled, key))
        flat = g.i64(self.batch, 1, self.heads * self.channels)
        return g.node("Reshape", y, flat), g.node("Reshape", after, g.i64(*self.state()))

    def pieces(self, delta: onnx.Value, h: onnx.Value, count: int, tokens: int) -> tuple[onnx.Value, onnx.Value]:
        """Return y [B, S, H·P] of the tokens and the state after them, from the state h before them.

        As matrix products (Mamba-2, arXiv 2405.21060, section 6), of `count` pieces of Q tokens side by side, as if
        each were a sequence of its own. What is one after the other is the state from piece to piece, in float32.
        Tokens that fill up the last piece have δ = 0 and change nothing.
        """
        g, share = self.emitter.graph, self.heads // self.groups
        q = -(-tokens // count)
        pieces = replace(self, batch=self.batch * count)

        def cut(value: onnx.Value, width: int) -> onnx.Value:
            """[B, S, width] → [B·count, Q, width]."""
            if q * count > tokens:
                rest = g.constant(np.zeros((self.batch, q * count - tokens, width), np.float32))
                value = g.node("Concat", value, rest, axis=1)
            return value if count == 1 else g.node("Reshape", value, g.i64(pieces.batch, q, width))

        def split(name: str, parts: int, size: int) -> onnx.Value:
            """[B, S, parts·size] → [B·count, parts, Q, size]."""
            rows = g.node("Reshape", cut(self.operand(name), parts * size), g.i64(pieces.batch, q, parts, size))
            return g.node("Transpose", rows, perm=[0, 2, 1, 3])

        u = split("x", self.heads, self.channels)
        key, query = (split(name, self.groups, self.width) for name in ("B", "C"))
        step = g.node("Transpose", cut(delta, self.heads), perm=[0, 2, 1])  # [B·count, H, Q]
        rate = g.node("Reshape", self.operand("A"), g.i64(self.heads, 1))
        decay = g.node("CumSum", g.node("Mul", step, rate), g.constant(np.array(2)))  # cᵢ

        gap = g.node("Sub", g.node("Unsqueeze", decay, g.i64(3)), g.node("Unsqueeze", decay, g.i64(2)))
        lower = g.constant(np.tril(np.ones((q, q), np.bool_)))
        fade = g.node("Exp", g.node("Where", lower, gap, g.f32(-np.inf)))  # [B·count, H, Q, Q]
        fade = g.node("Mul", fade, g.node("Unsqueeze", step, g.i64(2)))
        match = g.node("MatMul", query, g.node("Transpose", key, perm=[0, 1, 3, 2]))  # [B·count, G, Q, Q]
        grouped = g.node("Reshape", fade, g.i64(pieces.batch, self.groups, share, q, q))
        mixed = g.node(
            "Reshape", g.node("Mul", grouped, g.node("Unsqueeze", match, g.i64(2))), g.i64(*pieces.square(q))
        )
        inner = g.node("MatMul", mixed, u)

        last = g.node("Slice", decay, g.i64(q - 1), g.i64(q), g.i64(2))  # [B·count, H, 1]
        left = g.node("Mul", step, g.node("Exp", g.node("Sub", last, decay)))
        weighted = g.node("Mul", u, g.node("Unsqueeze", left, g.i64(3)))
        before, after = pieces.between(h, g.node("Unsqueeze", g.node("Exp", last), g.i64(3)), weighted, key, q, count)

        read = pieces.read(before, query, q)
        outer = g.node("Mul", read, g.node("Unsqueeze", g.node("Exp", decay), g.i64(3)))
        skip = g.node("Mul", u, g.node("Reshape", self.operand("D"), g.i64(self.heads, 1, 1)))
        y = g.node("Transpose", g.node("Add", g.node("Add", inner, outer), skip), perm=[0, 2, 1, 3])
        y = g.node("Reshape", y, g.i64(self.batch, q * count, self.heads * self.channels))
        return y if q * count == tokens else g.node("Slice", y, g.i64(0), g.i64(tokens), g.i64(1)), after

    def read(self, h: onnx.Value, query: onnx.Value, q: int) -> onnx.Value:
        """Return h C of each token, [B, H, Q, P]. For few tokens as a sum, which reads h where it lies."""
        g, share = self.emitter.graph, self.heads // self.groups
        if q > FEW_TOKENS:
            flat = g.node("Reshape", h, g.i64(self.batch, self.groups, share * self.channels, self.width))
            read = g.node("MatMul", query, g.node("Transpose", flat, perm=[0, 1, 3, 2]))  # [B, G, Q, H/G·P]
            read = g.node("Reshape", read, g.i64(self.batch, self.groups, q, share, self.channels))
            return g.node("Reshape", g.node("Transpose", read, perm=[0, 1, 3, 2, 4]), g.i64(*self.rows(q)))
        state = g.node("Reshape", h, g.i64(self.batch, self.groups, share, 1, self.channels, self.width))
        row = g.node("Unsqueeze", query, g.i64(2, 4))  # [B, G, 1, Q, 1, N]
        read = g.node("ReduceSum", g.node("Mul", state, row), g.i64(-1), keepdims=0)
        return g.node("Reshape", read, g.i64(*self.rows(q)))

    def between(
        self, h: onnx.Value, total: onnx.Value, weighted: onnx.Value, key: onnx.Value, q: int, count: int
    ) -> tuple[onnx.Value, onnx.Value]:
        """Return the states before each piece, [B·count, H, P, N], and the one after the last.

        From the state h [B, H, P, N] before the first; `total` [B·count, H, 1, 1] is what a piece leaves of a state.
        """
        g = self.emitter.graph
        if count == 1:
            return h, self.added(g.node("Mul", h, total), weighted, key, q)
        batch = self.batch // count
        gain = g.node("Reshape", self.gained(weighted, key, q), g.i64(batch, count, *self.state()[1:]))
        totals = g.node("Reshape", total, g.i64(batch, count, self.heads, 1, 1))
        states = [g.node("Unsqueeze", h, g.i64(1))]
        for kept, added in zip(g.split(totals, count, 1), g.split(gain, count, 1), strict=True):
            states.append(g.node("Add", g.node("Mul", states[-1], kept), added))
        before = g.node("Reshape", g.node("Concat", *states[:-1], axis=1), g.i64(*self.state()))
        return before, g.node("Squeeze", states[-1], g.i64(1))

    def gained(self, weighted: onnx.Value, key: onnx.Value, q: int) -> onnx.Value:
        """Return Σᵢ weighted[i] ⊗ key[i] of each piece, [B, H, P, N]."""
        g, share = self.emitter.graph, self.heads // self.groups
        turned = g.node("Transpose", weighted, perm=[0, 1, 3, 2])
        turned = g.node("Reshape", turned, g.i64(self.batch, self.groups, share * self.channels, q))
        return g.node("Reshape", g.node("MatMul", turned, key), g.i64(*self.state()))

    def added(self, kept: onnx.Value, weighted: onnx.Value, key: onnx.Value, q: int) -> onnx.Value:
        """Return kept + Σᵢ weighted[i] ⊗ key[i], [B, H, P, N]. For few tokens term by term, in the kernel of `kept`."""
        g, share = self.emitter.graph, self.heads // self.groups
        if q > FEW_TOKENS:
            return g.node("Add", kept, self.gained(weighted, key, q))
        after = g.node("Reshape", kept, g.i64(self.batch, self.groups, share, self.channels, self.width))
        for column, row in zip(g.split(weighted, q, 2), g.split(key, q, 2), strict=True):
            column = g.node("Reshape", column, g.i64(self.batch, self.groups, share, self.channels, 1))
            row = g.node("Reshape", row, g.i64(self.batch, self.groups, 1, 1, self.width))
            after = g.node("Add", after, g.node("Mul", column, row))
        return g.node("Reshape", after, g.i64(*self.state()))

    def square(self, q: int) -> tuple[int, int, int, int]:
        return self.batch, self.heads, q, q

    def rows(self, q: int) -> tuple[int, int, int, int]:
        return self.batch, self.heads, q, self.channels

    def state(self) -> tuple[int, int, int, int]:
        return self.batch, self.heads, self.channels, self.width
