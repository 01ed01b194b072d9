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


def write_cache(emitter: Emitter, node: Node) -> None:
    """TensorScatter at each sequence's length, which TensorRT does in place.

    Where tokens may be padding or reach behind the capacity, the rows that must stay are read from the
    cache and written back: a scatter writes whole, and always inside.
    """
    g = emitter.graph
    batch, tokens, _ = emitter.sizes(node.operand(0))
    cache, scale = node.operand(1), node.operands[4]
    _, heads, capacity, head_dim = emitter.sizes(cache)
    held, start, counts = emitter.get(cache), emitter.operand(node, 2), node.operands[3]
    dims, x = (batch, tokens, heads, head_dim), emitter.operand(node, 0)
    x = x if scale is None else g.node("Div", x, emitter.get(scale))
    if cache.type.dtype is DType.F8E4M3:
        values = rounded(emitter, _rows(emitter, x, dims, DType.F32))
        new, head_dim = pairs(emitter, values, (batch, heads, tokens, head_dim)), head_dim // 2
        emitter.bind_written(node.results[0], Rows(emitter.view(cache), values))
    else:
        new = _rows(emitter, x, dims, cache.type.dtype)
    if tokens > 1 or counts is not None:

        def places() -> tuple[onnx.Value, onnx.Value, onnx.Value, onnx.Value]:
            limit = None if counts is None else emitter.get(counts)
            return _places(emitter, emitter.operand(node, 2), limit, tokens, capacity)

        key = ("places", id(start), id(counts and emitter.get(counts)), tokens, capacity)
        start, kept, taken, is_new = emitter.shared_many(key, places)
        old = rows_of(emitter, held, (batch, heads, capacity, head_dim), kept)
        new = g.node("Where", is_new, rows_of(emitter, new, (batch, heads, tokens, head_dim), taken), old)
    emitter.bind(node.results[0], g.node("TensorScatter", held, new, start, axis=2, mode="linear"))


def _places(
    emitter: Emitter, lengths: onnx.Value, counts: onnx.Value | None, tokens: int, capacity: int
) -> tuple[onnx.Value, onnx.Value, onnx.Value, onnx.Value]:
    """Return where S rows are written, which rows of the cache lie there, which new ones go there, and if they do."""
    g = emitter.graph
    start = g.node("Min", lengths, g.i64(capacity - tokens))
    rows = g.node("Add", g.node("Unsqueeze", start, g.i64(1)), g.i64(*range(tokens)))  # [B, S]
    token = g.node("Sub", rows, g.node("Unsqueeze", lengths, g.i64(1)))
    is_new = g.node("GreaterOrEqual", token, g.i64(0))
    if counts is not None:
        is_new = g.node("And", is_new, g.node("Less", token, g.node("Unsqueeze", counts, g.i64(1))))
    clipped = g.node("Max", g.node("Min", token, g.i64(tokens - 1)), g.i64(0))
    kept, taken = (g.node("Unsqueeze", index, g.i64(1)) for index in (rows, clipped))  # the same for every head
    return start, kept, taken, g.node("Unsqueeze", is_new, g.i64(1, 3))


def _rows(emitter: Emitter, x: onnx.Value, dims: tuple[int, int, int, int], dtype: DType) -> onnx.Value:
    """Return x [B, S, H·P] as [B, H, S, P] of `dtype`; `dims` are [B, S, H, P]."""
    g = emitter.graph
    moved = g.node("Transpose", g.node("Reshape", x, g.i64(*dims)), perm=[0, 2, 1, 3])
    return moved if dtype is DType.F32 else g.node("Cast", moved, to=ONNX_DTYPES[dtype])


def cached_attention(emitter: Emitter, node: Node) -> None:
    """Cut the caches at the length of key_positions, then attend: one token by sums, more by Attention with a mask.

    Sums read the caches where they lie. Attention's kernels want the cut ones in memory of their own, which
    many tokens pay back. No kernel reads Attention's `nonpad_kv_seqlen`, although the parser accepts it.
    """
    g = emitter.graph
    heads, kv_heads = integer(node, "num_heads"), integer(node, "num_kv_heads")
    batch, tokens, width = emitter.sizes(node.operand(0))
    q, k_scale, v_scale = emitter.operand(node, 0), node.operands[5], node.operands[6]
    q = q if k_scale is None else g.node("Mul", q, emitter.get(k_scale))
    if tokens == 1 and emitter.rendering == "engine":
        q = g.node("Mul", q, g.f32((width // heads) ** -0.5))
        y = _one_token(emitter, node, g.node("Reshape", q, g.i64(batch, kv_heads, heads // kv_heads, width // heads)))
    else:
        y = _many_tokens(emitter, node, q, (batch, tokens, heads, width // heads))
    y = y if v_scale is None else g.node("Mul", y, emitter.get(v_scale))
    emitter.bind(node.results[0], g.node("Reshape", y, g.i64(batch, tokens, width)))


def _one_token(emitter: Emitter, node: Node, q: onnx.Value) -> onnx.Value:
    """Return attention of one token as sums, [B, Hkv, Hq/Hkv, P], for a scaled q of these dims."""
    lengths, positions = emitter.operand(node, 3), emitter.operand(node, 4)
    keys, values = (emitter.written(node.operand(i)) for i in (1, 2))
    length, dtype = _length(emitter, positions), node.operand(1).type.dtype
    if keys is not None and values is not None:
        before = _before(emitter, lengths, positions)
        return attend_one(emitter, q, keys, values, length, before)
    g = emitter.graph
    caches = (g.node("Slice", emitter.operand(node, i), g.i64(0), length, g.i64(2)) for i in (1, 2))
    k, v = (g.node("Unsqueeze", emitter.widened(x, dtype is DType.F32), g.i64(2)) for x in caches)
    product = g.node("ReduceSum", g.node("Mul", g.node("Unsqueeze", q, g.i64(3)), k), g.i64(4), keepdims=0)
    scores = g.node("Where", _mask(emitter, lengths, positions, 1), product, g.f32(NEVER))
    share = g.node("Unsqueeze", g.node("Softmax", scores, axis=-1), g.i64(4))
    return g.node("ReduceSum", g.node("Mul", share, v), g.i64(3), keepdims=0)


def _many_tokens(emitter: Emitter, node: Node, q: onnx.Value, dims: tuple[int, int, int, int]) -> onnx.Value:
    """Return attention of several tokens by the op of that name, [B, S, Hq, P], which `dims` are."""
    g = emitter.graph
    tokens, head_dim = dims[1], dims[3]
    lengths, positions = emitter.operand(node, 3), emitter.operand(node, 4)
    length, dtype = _length(emitter, positions), node.operand(1).type.dtype
    written = [rows for i in (1, 2) if (rows := emitter.written(node.operand(i)))]
    if written:
        dtype = DType.F32 if emitter.wide else DType.BF16
        one = g.constant(np.array(1, np.float32 if emitter.wide else ml_dtypes.bfloat16))
        older = [cut(emitter, rows, length, one) for rows in written]
        new = [emitter.activation(rows.values) for rows in written]
        k, v = (g.node("Concat", x, y, axis=2) for x, y in zip(older, new, strict=True))
        mask = _joined_mask(emitter, lengths, positions, tokens)
    else:
        k, v = (g.node("Slice", emitter.operand(node, i), g.i64(0), length, g.i64(2)) for i in (1, 2))
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
