"""Attention of a few new tokens over a cache of keys and values (flash decoding: Dao et al., arXiv 2205.14135).

    y = softmax(q k^T / sqrt(Z)) v,   token t sees the positions up to length + t

Bytes moved: the keys and values of the context, 2 Y (length + T) Z numbers a sequence, read once: the J / Y query heads
of a key head and the T tokens are the rows of one tile. The context is split evenly among PARTS programs of a
sequence and key head, so that one sequence fills the card; the split follows from the length, which is read on the
device, and the grid from the capacity. A second kernel joins the parts by their maxima and sums.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import SMS, begin, ceil_div, has_wide_products, overlapping, power_of_two, product_type


@triton.jit
def part_of(length, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Return how many positions each part has: whole blocks, those of the last part perhaps fewer."""
    return tl.cdiv(tl.cdiv(length, PARTS), BLOCK) * BLOCK


@triton.jit
def part_kernel(
    q, keys, values, lengths, sums, maxima, totals, CAPACITY, ROWS, TOKENS, KEY_HEADS, SCALE,
    Z: tl.constexpr, TYPE: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BZ: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the maxima, sums of weights and weighted sums of values of ROWS rows over one part of the context.

    Program (part, pair of a sequence and a key head); row m is token m % TOKENS of query head m // TOKENS.
    """
    begin()
    part = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    length = tl.load(lengths + pair // KEY_HEADS).to(tl.int32)
    size = part_of(length + TOKENS, PARTS, BLOCK)
    first = part * size
    last = tl.minimum(first + size, length + TOKENS)
    if first < last:
        m, z = tl.arange(0, BM), tl.arange(0, BZ)
        rows = m < ROWS
        tile = rows[:, None] & (z < Z)[None, :]
        query = tl.load(q + (pair * ROWS + m[:, None]) * Z + z[None, :], mask=tile, other=0.0).to(TYPE)
        seen = length + m % TOKENS  # the last position
        maximum = tl.full([BM], -float("inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        result = tl.zeros([BM, BZ], tl.float32)
        keys += pair * CAPACITY * Z
        values += pair * CAPACITY * Z
        for start in range(first, last, BLOCK):
            positions = start + tl.arange(0, BLOCK)
            inside = (positions < last)[:, None] & (z < Z)[None, :]
            at = positions[:, None] * Z + z[None, :]
            key = tl.load(keys + at, mask=inside, other=0.0).to(TYPE)
            value = tl.load(values + at, mask=inside, other=0.0).to(TYPE)
            scores = tl.dot(query, tl.trans(key), input_precision="ieee") * SCALE
            visible = (positions[None, :] <= seen[:, None]) & (positions < last)[None, :]
            scores = tl.where(visible, scores, -float("inf"))
            higher = tl.maximum(maximum, tl.max(scores, 1))
            shift = tl.where(higher == -float("inf"), 0.0, higher)  # nothing seen so far
            weights = tl.exp(scores - shift[:, None])
            factor = tl.exp(maximum - shift)
            total = total * factor + tl.sum(weights, 1)
            result = tl.dot(weights.to(TYPE), value, result * factor[:, None], input_precision="ieee")
            maximum = higher
        row = (pair * PARTS + part) * ROWS + m
        tl.store(maxima + row, maximum, mask=rows)
        tl.store(totals + row, total, mask=rows)
        tl.store(sums + row[:, None] * Z + z[None, :], result, mask=tile)


@triton.jit
def join_kernel(
    sums, maxima, totals, lengths, y, ROWS, TOKENS, KEY_HEADS,
    Z: tl.constexpr, PARTS: tl.constexpr, BP: tl.constexpr, BZ: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write BZ channels of row `program_id(0)` of pair `program_id(1)` of y from the parts that the context has."""
    begin()
    row = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    z = tl.program_id(2) * BZ + tl.arange(0, BZ)
    length = tl.load(lengths + pair // KEY_HEADS).to(tl.int32) + TOKENS
    count = tl.cdiv(length, part_of(length, PARTS, BLOCK))
    first = pair * PARTS * ROWS + row
    every = tl.arange(0, PARTS)
    highest = tl.max(tl.load(maxima + first + every * ROWS, mask=every < count, other=-float("inf")), 0)
    total = tl.zeros([BP], tl.float32)
    result = tl.zeros([BP, BZ], tl.float32)
    for start in range(0, count, BP):
        parts = start + tl.arange(0, BP)
        valid = parts < count
        at = first + parts * ROWS
        factor = tl.exp(tl.load(maxima + at, mask=valid, other=-float("inf")) - highest)
        total += tl.load(totals + at, mask=valid, other=0.0) * factor
        part = tl.load(sums + at[:, None] * Z + z[None, :], mask=valid[:, None] & (z < Z)[None, :], other=0.0)
        result += part * factor[:, None]
    joined = tl.sum(result, 0) / tl.sum(total, 0)
    tl.store(y + (pair * ROWS + row) * Z + z, joined.to(y.dtype.element_ty), mask=z < Z)


def cached_attention(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """Return y [B, J, T, Z] of the queries q [B, J, T, Z], of their type.

    keys and values [B, Y, C, Z] hold the T new tokens already, at the positions lengths … lengths + T - 1; lengths [B]
    int64 are the tokens before them.
    """
    assert keys.is_contiguous() and values.is_contiguous()
    batch, heads, tokens, channels = q.shape
    key_heads, capacity = keys.shape[1], keys.shape[2]
    q = q.contiguous()
    rows = heads // key_heads * tokens
    pairs = batch * key_heads
    block_m, block_z = max(power_of_two(rows), 16), max(power_of_two(channels), 16)
    # 64 positions of 128 channels are 32 KB of keys and values; a few such tiles in flight on each SM.
    block = min(64, max(power_of_two(capacity), 16))
    parts = power_of_two(max(1, min(2 * SMS // pairs, ceil_div(capacity, block)) // 2 + 1))
    sums = torch.empty(pairs, parts, rows, channels, dtype=torch.float32, device=q.device)
    maxima, totals = (torch.empty(pairs, parts, rows, dtype=torch.float32, device=q.device) for _ in range(2))
    y = torch.empty_like(q)
    rows_of_four_warps = 64 if has_wide_products(q) else 32  # more would not stay in registers
    options = {"num_warps": 4 if block_m <= rows_of_four_warps else 8, "num_stages": 3 if block_m < 64 else 2}
    options |= overlapping(q)
    part_kernel[(parts, pairs)](
        q, keys, values, lengths, sums, maxima, totals, capacity, rows, tokens, key_heads, 1 / math.sqrt(channels),
        channels, product_type(q), parts, block_m, block_z, block, **options,
    )  # fmt: skip
    join_kernel[(rows, pairs, ceil_div(channels, 32))](
        sums, maxima, totals, lengths, y, rows, tokens, key_heads,
        channels, parts, min(parts, 16), 32, block, num_warps=4, **overlapping(q),
    )  # fmt: skip
    return y
