"""Mamba-2 with states: the convolution over a window and the SSD recurrence, token by token."""

from __future__ import annotations

import onnx_ir as onnx

from n3c.ir.program import Node, Value
from n3c.ir.types import DType

from ..dtypes import ONNX_DTYPES
from ..emitter import Emitter, integer
from .elementwise import silu


def _stored(emitter: Emitter, x: onnx.Value, state: Value) -> onnx.Value:
    """Return float32 x in the type in which `state` is stored."""
    if state.type.dtype is DType.F32:
        return x
    return emitter.graph.node("Cast", x, to=ONNX_DTYPES[state.type.dtype])


def causal_conv1d_update(emitter: Emitter, node: Node) -> None:
    """Append the tokens to the window [B, C, W - 1], sum W columns a token, keep the last W - 1."""
    g = emitter.graph
    _, tokens, _ = emitter.sizes(node.operand(0))
    channels, _, width = emitter.sizes(node.operand(2))
    window = node.operand(1)
    new = g.node("Transpose", emitter.operand(node, 0), perm=[0, 2, 1])
    columns = g.node("Concat", emitter.f32(window), new, axis=2)
    weight = g.node("Reshape", emitter.f32(node.operand(2)), g.i64(channels, width))
    outputs: list[onnx.Value] = []
    for s in range(tokens):
        seen = columns if tokens == 1 else g.node("Slice", columns, g.i64(s), g.i64(s + width), g.i64(2))
        y = g.node("ReduceSum", g.node("Mul", seen, weight), g.i64(2), keepdims=0)
        bias = node.operands[3]
        y = y if bias is None else g.node("Add", y, emitter.f32(bias))
        outputs.append(g.node("Unsqueeze", silu(emitter, y), g.i64(1)))
    kept = g.node("Slice", columns, g.i64(tokens), g.i64(tokens + width - 1), g.i64(2))
    emitter.bind_results(node, [_joined(emitter, outputs), _stored(emitter, kept, window)])


def ssd_update(emitter: Emitter, node: Node) -> None:
    """With a = exp(δA): h' = a h + δx ⊗ B and y = a (h·C) + δx (B·C) + D x, h as [B, G, H/G, P, N].

    The y of the definition, h'·C + D x, multiplied out: so both read the old state, in one kernel, and
    the new state is written but not read back.
    """
    g = emitter.graph
    x, dt, a, b, c, d, dt_bias, state = node.operands
    assert x and dt and a and b and c and d and dt_bias and state
    batch, heads, channels, width = emitter.sizes(state)
    groups = integer(node, "n_groups")
    tokens, share = emitter.sizes(x)[1], heads // groups
    delta = g.node("Softplus", g.node("Add", emitter.get(dt), emitter.get(dt_bias)))
    decay = g.node("Exp", g.node("Mul", delta, emitter.get(a)))
    h = g.node("Reshape", emitter.f32(state), g.i64(batch, groups, share, channels, width))
    skip = g.node("Reshape", emitter.get(d), g.i64(1, groups, share, 1, 1))
    outputs: list[onnx.Value] = []
    for s in range(tokens):

        def token(value: onnx.Value, *dims: int, s: int = s) -> onnx.Value:
            one = value if tokens == 1 else g.node("Slice", value, g.i64(s), g.i64(s + 1), g.i64(1))
            return g.node("Reshape", one, g.i64(batch, groups, *dims))

        u, step, keep = token(emitter.get(x), share, channels, 1), token(delta, share, 1, 1), token(decay, share, 1, 1)
        key, query = token(emitter.get(b), 1, 1, width), token(emitter.get(c), 1, 1, width)
        scaled = g.node("Mul", u, step)
        read = g.node("ReduceSum", g.node("Mul", h, query), g.i64(-1), keepdims=1)
        match = g.node("ReduceSum", g.node("Mul", key, query), g.i64(-1), keepdims=1)
        y = g.node("Add", g.node("Mul", read, keep), g.node("Mul", scaled, match))
        y = g.node("Add", y, g.node("Mul", u, skip))
        outputs.append(g.node("Reshape", y, g.i64(batch, 1, heads * channels)))
        h = g.node("Add", g.node("Mul", h, keep), g.node("Mul", scaled, key))
    after = g.node("Reshape", h, g.i64(batch, heads, channels, width))
    emitter.bind_results(node, [_joined(emitter, outputs), _stored(emitter, after, state)])


def _joined(emitter: Emitter, tokens: list[onnx.Value]) -> onnx.Value:
    """Return [B, 1, …] values as one [B, S, …]."""
    return tokens[0] if len(tokens) == 1 else emitter.graph.node("Concat", *tokens, axis=1)
