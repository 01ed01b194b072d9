"""Codes bound as bytes, decoded by tables: of 256 entries for a byte, of 16 for each half of one.

For types that cannot be gathered from (FP4), and for GPUs that lack them (FP4 before Blackwell, FP8
before Ada): a signed byte plus 128 is the index. From the gather to the sum all is one kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import ml_dtypes
import numpy as np
import onnx_ir as onnx

from n3c.backends.onnx.emitter import Emitter
from n3c.backends.onnx.graph import Array
from n3c.ir.formats import NVFP4_BLOCK

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""Code → value."""

_BYTES = np.arange(-128, 128) & 0xFF
"""Place in a table → the byte that stands there."""


def nibble_tables() -> tuple[Array, Array]:
    """Return byte + 128 → value of its low and of its high nibble as E2M1, float32 [256] each."""
    return E2M1[_BYTES & 15], E2M1[_BYTES >> 4]


def e4m3_table() -> Array:
    """Return byte + 128 → its value as E4M3, float32 [256]; the two codes of NaN, which no checkpoint has, give 0."""
    values = _BYTES.astype(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return np.where(np.isnan(values), np.float32(0), values)


def places(emitter: Emitter, codes: onnx.Value) -> onnx.Value:
    """Return where in a table the bytes `codes` are looked up."""
    g = emitter.graph
    return g.node("Add", g.node("Cast", codes, to=onnx.DataType.INT32), g.constant(np.array(128, np.int32)))


def looked_up(emitter: Emitter, table: Array, index: onnx.Value) -> onnx.Value:
    """Return the entries of `table` [T] at `index` i32."""
    g = emitter.graph
    return rows(emitter, g.constant(table), g.node("Cast", index, to=onnx.DataType.INT64))


def rows(emitter: Emitter, values: onnx.Value, index: onnx.Value) -> onnx.Value:
    """Return the rows of `values` [R, ...] at `index` i64, by GatherND: after a Gather kernels load single elements."""
    g = emitter.graph
    return g.node("GatherND", values, g.node("Unsqueeze", index, g.i64(-1)))


def e4m3(emitter: Emitter, codes: onnx.Value) -> onnx.Value:
    """Return E4M3 bytes in float32."""
    return looked_up(emitter, e4m3_table(), places(emitter, codes))


def e2m1(emitter: Emitter, codes: onnx.Value, scales: onnx.Value) -> onnx.Value:
    """Return a whole weight in float32: the graph input `codes` i8 [..., N, K/16, 8] times `scales` [..., N, K/16]."""
    g = emitter.graph
    *outer, blocks, _ = (d for d in codes.shape or () if isinstance(d, int))
    pairs = g.node("Gather", g.constant(np.stack(nibble_tables(), axis=-1)), places(emitter, codes), axis=0)
    values = g.node("Reshape", pairs, g.i64(*outer, blocks, NVFP4_BLOCK))
    scaled = g.node("Mul", values, g.node("Unsqueeze", scales, g.i64(-1)))
    return g.node("Reshape", scaled, g.i64(*outer, blocks * NVFP4_BLOCK))


def e2m1_product(
    emitter: Emitter, x: onnx.Value, codes: onnx.Value, scales: onnx.Value, dims: tuple[int, ...]
) -> onnx.Value:
    """Σ over blocks of (Σ over the 16 codes of a block of code · x) · scale.

    `codes` i8 [..., N, K/16, 8] and `scales` float32 [..., N, K/16] meet `x` float32 [..., 1, K]; `dims` are
    [..., N, K] of the product before the sum. → [..., N].

    x comes as 16 planes [..., K/16]: neighbouring lanes take neighbouring blocks, and find their numbers side by
    side. The sums are made as the planes of a next such product; where one follows, the transposes cancel. All bytes
    of a block are looked up, and multiplied, by one node: the builder's time grows with the nodes. The planes are
    joined again for that, which costs the kernel nothing; that they were cut apart makes the builder write them to
    memory.
    """
    g = emitter.graph
    *outer, n, width = dims
    rank, blocks = len(outer), width // NVFP4_BLOCK
    planes = _planes(emitter, x, rank, blocks)
    lower, upper = _nibbles(emitter, codes)
    even, odd = looked_up(emitter, E2M1, lower), looked_up(emitter, np.roll(E2M1, 8), upper)
    x_even, x_odd = (g.node("Concat", *planes[i::2], axis=-1) for i in (0, 1))  # [..., 1, K/16, 8]
    pairs = g.node("Add", g.node("Mul", even, x_even), g.node("Mul", odd, x_odd))
    parts = g.split(pairs, NVFP4_BLOCK // 2, -1)
    summed = g.node("Squeeze", reduce(lambda a, b: g.node("Add", a, b), parts), g.i64(-1))
    product = g.node("Mul", summed, scales)
    if n % NVFP4_BLOCK:
        return g.node("ReduceSum", product, g.i64(-1), keepdims=0)
    grouped = g.node("Reshape", product, g.i64(*outer, n // NVFP4_BLOCK, NVFP4_BLOCK, blocks))
    swapped = g.node("Transpose", grouped, perm=[*range(rank), rank + 1, rank, rank + 2])
    sums = g.node("ReduceSum", swapped, g.i64(-1), keepdims=0)
    return g.node("Reshape", g.node("Transpose", sums, perm=[*range(rank), rank + 1, rank]), g.i64(*outer, n))


def _nibbles(emitter: Emitter, codes: onnx.Value) -> tuple[onnx.Value, onnx.Value]:
    """Return the low nibbles of the bytes `codes`, and the high ones plus 8, modulo 16; i32.

    Both are places in tables of 16 entries, which 32 lanes read at once: of one of 256, as the byte itself would be,
    some of them would wait for others. 16 times is spelled by doubling: what a constant multiplies the builder does
    not see to be below 16, and checks.
    """
    g, index = emitter.graph, places(emitter, codes)
    upper = g.node("Div", index, g.constant(np.array(16, np.int32)))
    sixteenfold = upper
    for _ in range(4):
        sixteenfold = g.node("Add", sixteenfold, sixteenfold)
    return g.node("Sub", index, sixteenfold), upper


def _planes(emitter: Emitter, x: onnx.Value, rank: int, blocks: int) -> Sequence[onnx.Value]:
    """Return the 16 planes [..., 1, K/16, 1] of x [..., 1, K], which has `rank` dims in front: i, i + 16, i + 32 …"""
    g = emitter.graph
    split = g.node("Reshape", x, g.i64(*[0] * rank, blocks, NVFP4_BLOCK, 1))
    turned = g.node("Transpose", split, perm=[*range(rank), rank + 1, rank, rank + 2])
    return g.split(turned, NVFP4_BLOCK, -3)
