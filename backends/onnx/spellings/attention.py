"""Key and value caches: writing tokens into them, and attention to what is filled."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as onnx

from n3c.backends.onnx.dtypes import ONNX_DTYPES
from n3c.backends.onnx.emitter import Emitter, Rows, integer
from n3c.ir.program import Node
from n3c.ir.types import DType

from .elementwise import rows_of
from .fp8_cache import NEVER, attend_one, cut, pairs, rounded
from .one_token import scores, weighted

CACHES = ("k_cache", "v_cache")
"""Operands of cached_attention."""


def write_cache(emitter: Emitter, node: Node) -> None:
    """TensorScatter at each sequence's length, which TensorRT does in place.

    Where tokens may be padding or reach beyond the capacity, the rows that must stay are read from the
    cache and written back: a scatter writes whole, and always inside.
    """
    g = emitter.graph
    batch, tokens, _ = emitter.sizes(node["new"])
    _, heads, capacity, _ = emitter.sizes(node["cache"])
    held, start = emitter.operand(node, "cache"), emitter.operand(node, "lengths")
    new, width = _as_held(emitter, node)
    if tokens > 1 or node.get("counts") is not None:
        start, kept, taken, is_new = _places(emitter, node, tokens, capacity)
        old = rows_of(emitter, held, (batch, heads, capacity, width), kept)
        new = g.node("Where", is_new, rows_of(emitter, new, (batch, heads, tokens, width), taken), old)
    emitter.bind(node.results[0], g.node("TensorScatter", held, new, start, axis=2, mode="linear"))


def _as_held(emitter: Emitter, node: Node) -> tuple[onnx.Value, int]:
    """Return the new rows as the cache holds them, [B, H, S, width], and the width: FP8 codes are held in pairs."""
    g = emitter.graph
    batch, tokens, _ = emitter.sizes(node["new"])
    cache, scale, x = node["cache"], node.get("scale"), emitter.operand(node, "new")
    _, heads, _, head_dim = emitter.sizes(cache)
    x = x if scale is None else g.node("Div", x, emitter.get(scale))
    dims = (batch, tokens, heads, head_dim)
    if cache.type.dtype is not DType.F8E4M3:
        return _rows(emitter, x, dims, cache.type.dtype), head_dim
    values = rounded(emitter, _rows(emitter, x, dims, DType.F32))
    emitter.bind_written(node.results[0], Rows(emitter.view(cache), values))
    return pairs(emitter, values, (batch, heads, tokens, head_dim)), head_dim // 2


def _places(
    emitter: Emitter, node: Node, tokens: int, capacity: int
) -> tuple[onnx.Value, onnx.Value, onnx.Value, onnx.Value]:
    """Return where S rows are written, which rows of the cache lie there, which new ones go there, and if they do."""
    g = emitter.graph
    lengths, counted = emitter.operand(node, "lengths"), node.get("counts")
    counts = None if counted is None else emitter.get(counted)

    def make() -> tuple[onnx.Value, onnx.Value, onnx.Value, onnx.Value]:
        start = g.node("Min", lengths, g.i64(capacity - tokens))
        rows = g.node("Add", g.node("Unsqueeze", start, g.i64(1)), g.i64(*range(tokens)))  # [B, S]
        token = g.node("Sub", rows, g.node("Unsqueeze", lengths, g.i64(1)))
        is_new = g.node("GreaterOrEqual", token, g.i64(0))
        if counts is not None:
            is_new = g.node("And", is_new, g.node("Less", token, g.node("Unsqueeze", counts, g.i64(1))))
        clipped = g.node("Max", g.node("Min", token, g.i64(tokens - 1)), g.i64(0))
        kept, taken = (g.node("Unsqueeze", index, g.i64(1)) for index in (rows, clipped))  # the same for every head
        return start, kept, taken, g.node("Unsqueeze", is_new, g.i64(1, 3))

    start, kept, taken, is_new = emitter.shared_many(("places", id(lengths), id(counts), tokens, capacity), make)
    return start, kept, taken, is_new


def _rows(emitter: Emitter, x: onnx.Value, dims: tuple[int, int, int, int], dtype: DType) -> onnx.Value:
    """Return x [B, S, H·P] as [B, H, S, P] of `dtype`; `dims` are [B, S, H, P]."""
    g = emitter.graph
    moved = g.node("Transpose", g.node("Reshape", x, g.i64(*dims)), perm=[0, 2, 1, 3])
    return moved if dtype is DType.F32 else g.node("Cast", moved, to=ONNX_DTYPES[dtype])


def cached_attention(emitter: Emitter, node: Node) -> None:
    """Cut the caches at the length of key_positions, then attend: one token by `one_token`, more by Attention.

    One token reads keys where they lie. Attention's kernels want the cut ones in memory of their own, which
    many tokens pay back. No kernel reads Attention's `nonpad_kv_seqlen`, although the parser accepts it.
    """
    g = emitter.graph
    heads, kv_heads = integer(node, "num_heads"), integer(node, "num_kv_heads")
    batch, tokens, width = emitter.sizes(node["q"])
    q, k_scale, v_scale = emitter.operand(node, "q"), node.get("k_scale"), node.get("v_scale")
    q = q if k_scale is None else g.node("Mul", q, emitter.get(k_scale))
    if tokens == 1 and emitter.rendering == "engine":
        q = g.node("Mul", q, g.f32((width // heads) ** -0.5))
        share = heads // kv_heads
        y = _one_token(emitter, node, g.node("Reshape", q, g.i64(batch, kv_heads, share, width // heads)), share)
    else:
        y = _many_tokens(emitter, node, q, (batch, tokens, heads, width // heads))
    y = y if v_scale is None else g.node("Mul", y, emitter.get(v_scale))
    emitter.bind(node.results[0], g.node("Reshape", y, g.i64(batch, tokens, width)))


def _one_token(emitter: Emitter, node: Node, q: onnx.Value, heads: int) -> onnx.Value:
    """Return attention of one token, [B, Hkv, G, P], for a scaled q of these dims; G is `heads`, Hq / Hkv."""
    lengths, positions = emitter.operand(node, "lengths"), emitter.operand(node, "key_positions")
    keys, values = (emitter.written(node[name]) for name in CACHES)
    length, dtype = _length(emitter, positions), node["k_cache"].type.dtype
    if keys is not None and values is not None:
        before = _before(emitter, lengths, positions)
        return attend_one(emitter, q, keys, values, length, before, heads)
    g = emitter.graph
    caches = (g.node("Slice", emitter.operand(node, name), g.i64(0), length, g.i64(2)) for name in CACHES)
    k, v = (emitter.widened(x, dtype is DType.F32) for x in caches)
    seen = g.node("Where", _mask(emitter, lengths, positions, 1), scores(emitter, q, k, heads), g.f32(NEVER))
    return weighted(emitter, g.node("Softmax", seen, axis=-1), v)


def _many_tokens(emitter: Emitter, node: Node, q: onnx.Value, dims: tuple[int, int, int, int]) -> onnx.Value:
    """Return attention of several tokens by the op of that name, [B, S, Hq, P], which `dims` are."""
    g = emitter.graph
    tokens, head_dim = dims[1], dims[3]
    lengths, positions = emitter.operand(node, "lengths"), emitter.operand(node, "key_positions")
    length, dtype = _length(emitter, positions), node["k_cache"].type.dtype
    written = [rows for name in CACHES if (rows := emitter.written(node[name]))]
    if written:
        dtype = DType.F32 if emitter.wide else DType.BF16
        one = g.constant(np.array(1, np.float32 if emitter.wide else ml_dtypes.bfloat16))
        older = [cut(emitter, rows, length, one) for rows in written]
        new = [emitter.activation(rows.values) for rows in written]
        k, v = (g.node("Concat", x, y, axis=2) for x, y in zip(older, new, strict=True))
        mask = _joined_mask(emitter, lengths, positions, tokens)
    else:
        k, v = (g.node("Slice", emitter.operand(node, name), g.i64(0), length, g.i64(2)) for name in CACHES)
        mask = _mask(emitter, lengths, positions, tokens)
    y = g.node("Attention", _rows(emitter, q, dims, dtype), k, v, mask, scale=head_dim**-0.5)
    return g.node("Transpose", emitter.widened(y, dtype is DType.F32), perm=[0, 2, 1, 3])


def _length(emitter: Emitter, positions: onnx.Value) -> onnx.Value:
    """Return L as i64 [1], from the shape of an input: taken from deeper tensors it is slow to build."""
    return emitter.shared(("length", id(positions)), lambda: emitter.graph.node("Shape", positions))


def _mask(emitter: Emitter, lengths: onnx.Value, positions: onnx.Value, tokens: int) -> onnx.Value:
    """Return [B, 1, S, L]: query s of sequence b sees the places up to lengths[b] + s."""
    g = emitter.graph

    def make() -> onnx.Value:
        step = g.constant(np.arange(tokens).reshape(1, 1, -1, 1))
        last = g.node("Add", g.node("Unsqueeze", lengths, g.i64(1, 2, 3)), step)
        return g.node("LessOrEqual", g.node("Unsqueeze", positions, g.i64(0, 1, 2)), last)

    return emitter.shared(("mask", id(lengths), id(positions), tokens), make)


def _before(emitter: Emitter, lengths: onnx.Value, positions: onnx.Value) -> onnx.Value:
    """Return [B, 1, 1, L]: the places that hold tokens of before the call."""
    g = emitter.graph

    def make() -> onnx.Value:
        return g.node(
            "Less", g.node("Unsqueeze", positions, g.i64(0, 1, 2)), g.node("Unsqueeze", lengths, g.i64(1, 2, 3))
        )

    return emitter.shared(("before", id(lengths), id(positions)), make)


def _joined_mask(emitter: Emitter, lengths: onnx.Value, positions: onnx.Value, tokens: int) -> onnx.Value:
    """Return [B, 1, S, L + S]: every query sees the places before the call, and of its tokens those up to itself."""
    g = emitter.graph
    batch = emitter.dims["B"]

    def make() -> onnx.Value:
        wide = g.node("Concat", g.i64(batch, 1, tokens), _length(emitter, positions), axis=0)
        before = g.node("Expand", _before(emitter, lengths, positions), wide)
        own = np.broadcast_to(np.tril(np.ones((tokens, tokens), np.bool_)), (batch, 1, tokens, tokens))
        return g.node("Concat", before, g.constant(np.ascontiguousarray(own)), axis=3)

    return emitter.shared(("joined", id(lengths), id(positions), tokens), make)
