"""Attention over key and value caches."""

from __future__ import annotations

import numpy as np
import onnx_ir as onnx

from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError
from n3c.ir.program import Node
from n3c.ir.types import DType

from ..dtypes import ONNX_DTYPES
from ..emitter import Emitter, integer

CACHE_DTYPES = (DType.F32, DType.F16, DType.BF16)
"""What TensorRT's KVCacheUpdate takes."""


def cached_attention(emitter: Emitter, node: Node) -> None:
    """TensorScatter into both caches at each sequence's length, then Attention with a mask, in the caches' type.

    TensorRT turns these into in-place cache updates and one attention kernel. The mask is there
    because no kernel reads Attention's `nonpad_kv_seqlen`, although the parser accepts it.
    """
    g = emitter.graph
    heads, kv_heads = integer(node, "num_heads"), integer(node, "num_kv_heads")
    batch, tokens, width = emitter.sizes(node.operand(0))
    cache = node.operand(3)
    if cache.type.dtype not in CACHE_DTYPES:
        raise N3CError(
            Diagnostic(
                "E0508",
                f"TensorRT updates no cache of {cache.type.dtype.value} in place",
                node.origin.span,
                help='set serving.kv_cache_dtype = "bf16"',
            ),
            ExitCode.TARGET,
        )
    _, _, capacity, head_dim = emitter.sizes(cache)
    lengths = emitter.operand(node, 5)

    def rows(index: int, count: int) -> onnx.Value:
        split = g.node("Reshape", emitter.operand(node, index), g.i64(batch, tokens, count, head_dim))
        moved = g.node("Transpose", split, perm=[0, 2, 1, 3])
        if cache.type.dtype is DType.F32:
            return moved
        return g.node("Cast", moved, to=ONNX_DTYPES[cache.type.dtype])

    def write(index: int, place: int) -> onnx.Value:
        return g.node(
            "TensorScatter", emitter.operand(node, place), rows(index, kv_heads), lengths, axis=2, mode="linear"
        )

    keys, values = write(1, 3), write(2, 4)
    mask = emitter.shared(("mask", id(lengths), tokens, capacity), lambda: _mask(emitter, lengths, tokens, capacity))
    y = g.node("Attention", rows(0, heads), keys, values, mask, scale=head_dim**-0.5)
    if cache.type.dtype is not DType.F32:
        y = g.node("Cast", y, to=onnx.DataType.FLOAT)
    y = g.node("Reshape", g.node("Transpose", y, perm=[0, 2, 1, 3]), g.i64(batch, tokens, width))
    emitter.bind_results(node, [y, keys, values])


def _mask(emitter: Emitter, lengths: onnx.Value, tokens: int, capacity: int) -> onnx.Value:
    """Return [B, 1, S, M]: query s of sequence b sees the places up to lengths[b] + s."""
    g = emitter.graph
    last = g.node(
        "Add", g.node("Unsqueeze", lengths, g.i64(1, 2, 3)), g.constant(np.arange(tokens).reshape(1, 1, -1, 1))
    )
    return g.node("LessOrEqual", g.constant(np.arange(capacity).reshape(1, 1, 1, -1)), last)
