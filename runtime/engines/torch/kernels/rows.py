"""Products of one row of activations, in float32 lane by lane.

A thread loads 16 bytes of each of BN rows of the matrix, and the activations that belong to them once, without moving
anything between threads.
"""

import triton
import triton.language as tl

from .launching import wait_for_previous
from .weights import X_SCALE, block_scale, high, low, pair_e2m1, pair_e4m3


@triton.jit
def lower(word):
    """Return the lower float32 of a word of 64 bits."""
    return word.to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def upper(word):
    """Return the upper float32 of a word of 64 bits."""
    return (word >> 32).to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def two_words(x, units, PLACE: tl.constexpr, inside, PER_UNIT: tl.constexpr):
    """Return the 64-bit words 2 PLACE and 2 PLACE + 1 of each unit of x: one load of 16 bytes a thread."""
    at = x + units[:, None] * PER_UNIT + (2 * PLACE + tl.arange(0, 2)[None, :])
    return tl.split(tl.load(at, mask=inside[:, None], other=0))


@triton.jit
def eight(x, units, PLACE: tl.constexpr, inside, UNIT: tl.constexpr, WIDE: tl.constexpr):
    """Return the activations 8 PLACE … 8 PLACE + 7 of each unit, eight [KU] of float32; WIDE: x is float32."""
    if WIDE:
        a, b = two_words(x, units, 2 * PLACE, inside, UNIT // 2)
        c, d = two_words(x, units, 2 * PLACE + 1, inside, UNIT // 2)
        values = (lower(a), upper(a), lower(b), upper(b), lower(c), upper(c), lower(d), upper(d))
    else:
        a, b = two_words(x, units, PLACE, inside, UNIT // 4)
        a_low, a_high, b_low, b_high = (
            a.to(tl.uint32),
            (a >> 32).to(tl.uint32),
            b.to(tl.uint32),
            (b >> 32).to(tl.uint32),
        )
        values = (
            low(a_low),
            high(a_low),
            low(a_high),
            high(a_high),
            low(b_low),
            high(b_low),
            low(b_high),
            high(b_high),
        )
    return values


@triton.jit
def add_e2m1(sums, word, x, units, PLACE: tl.constexpr, inside, WIDE: tl.constexpr):
    """Add to `sums` [BN, KU] what the eight E2M1 codes of `word` give, times 2^-66."""
    x0, x1, x2, x3, x4, x5, x6, x7 = eight(x, units, PLACE, inside, 32, WIDE)
    pair = pair_e2m1(word, 0)
    sums += low(pair) * (x0 * X_SCALE)[None, :]
    sums += high(pair) * (x4 * X_SCALE)[None, :]
    pair = pair_e2m1(word, 1)
    sums += low(pair) * (x1 * X_SCALE)[None, :]
    sums += high(pair) * (x5 * X_SCALE)[None, :]
    pair = pair_e2m1(word, 2)
    sums += low(pair) * (x2 * X_SCALE)[None, :]
    sums += high(pair) * (x6 * X_SCALE)[None, :]
    pair = pair_e2m1(word, 3)
    sums += low(pair) * (x3 * X_SCALE)[None, :]
    sums += high(pair) * (x7 * X_SCALE)[None, :]
    return sums


@triton.jit
def add_e4m3(sums, words, x, units, PLACE: tl.constexpr, inside, WIDE: tl.constexpr):
    """Add to `sums` [BN, KU] what the eight E4M3 codes of 64-bit `words` give, times 2^-60."""
    x0, x1, x2, x3, x4, x5, x6, x7 = eight(x, units, PLACE, inside, 16, WIDE)
    pair = pair_e4m3(words.to(tl.uint32), 0)
    sums += low(pair) * (x0 * X_SCALE)[None, :]
    sums += high(pair) * (x2 * X_SCALE)[None, :]
    pair = pair_e4m3(words.to(tl.uint32), 1)
    sums += low(pair) * (x1 * X_SCALE)[None, :]
    sums += high(pair) * (x3 * X_SCALE)[None, :]
    pair = pair_e4m3((words >> 32).to(tl.uint32), 0)
    sums += low(pair) * (x4 * X_SCALE)[None, :]
    sums += high(pair) * (x6 * X_SCALE)[None, :]
    pair = pair_e4m3((words >> 32).to(tl.uint32), 1)
    sums += low(pair) * (x5 * X_SCALE)[None, :]
    sums += high(pair) * (x7 * X_SCALE)[None, :]
    return sums


@triton.jit
def row_units(data, scales, rows, first, UNITS: tl.constexpr, FORMAT: tl.constexpr, KU: tl.constexpr):
    """Return the two words of 64 bits of the KU units from `first` in `rows` [BN], and the scales of their blocks.

    Each is [BN, KU]. What a thread loads is a row of its tile, contiguous along K, so that every version of Triton
    lays threads along K.
    """
    words = 2 * first + tl.arange(0, 2 * KU)
    word = tl.load(data + rows[:, None] * (2 * UNITS) + words[None, :], mask=(words < 2 * UNITS)[None, :], other=0)
    a, b = tl.split(tl.reshape(word, [rows.shape[0], KU, 2]))
    scale = a
    if FORMAT == "nvfp4":
        # Two bytes a thread, where it wants them: wider loads would have to be moved among threads.
        units = first + tl.max_contiguous(tl.arange(0, KU), 1)
        scale = tl.load(scales + rows[:, None] * UNITS + units[None, :], mask=(units < UNITS)[None, :], other=0)
    return a, b, scale


@triton.jit
def row_product(
    x, data, scales, rows, K: tl.constexpr, FORMAT: tl.constexpr, WIDE: tl.constexpr, BN: tl.constexpr, KU: tl.constexpr
):
    """Return the products [BN] of one x [K] with `rows` [BN] of a matrix, before the matrix' scale.

    x and data are pointers to int64, scales to int16, two blocks each. A unit is 16 bytes of a row: 32, 16 or 8
    weights; a tile has KU of them, 32 for each warp, so that the threads of all warps lie along K and each holds the
    same unit of every row.
    """
    UNIT: tl.constexpr = 32 if FORMAT == "nvfp4" else (16 if FORMAT == "fp8" else 8)
    UNITS: tl.constexpr = K // UNIT
    total = tl.zeros([BN, KU], tl.float32)
    a, b, scale = row_units(data, scales, rows, 0, UNITS, FORMAT, KU)
    wait_for_previous()  # x is the result of the kernel before, weights are nobody's
    for first in range(0, UNITS, KU):
        units = first + tl.arange(0, KU)
        inside = units < UNITS
        # What the next round needs is asked for before this one computes; after the last that is nothing.
        next_a, next_b, next_scale = row_units(data, scales, rows, first + KU, UNITS, FORMAT, KU)
        if FORMAT == "nvfp4":
            sums = tl.zeros([BN, KU], tl.float32)
            sums = add_e2m1(sums, a.to(tl.uint32), x, units, 0, inside, WIDE)
            sums = add_e2m1(sums, (a >> 32).to(tl.uint32), x, units, 1, inside, WIDE)
            total += sums * block_scale(scale)
            sums = tl.zeros([BN, KU], tl.float32)
            sums = add_e2m1(sums, b.to(tl.uint32), x, units, 2, inside, WIDE)
            sums = add_e2m1(sums, (b >> 32).to(tl.uint32), x, units, 3, inside, WIDE)
            total += sums * block_scale(scale >> 8)
        elif FORMAT == "fp8":
            total = add_e4m3(total, a, x, units, 0, inside, WIDE)
            total = add_e4m3(total, b, x, units, 1, inside, WIDE)
        else:
            x0, x1, x2, x3, x4, x5, x6, x7 = eight(x, units, 0, inside, 8, WIDE)
            total += low(a.to(tl.uint32)) * x0[None, :]
            total += high(a.to(tl.uint32)) * x1[None, :]
            total += low((a >> 32).to(tl.uint32)) * x2[None, :]
            total += high((a >> 32).to(tl.uint32)) * x3[None, :]
            total += low(b.to(tl.uint32)) * x4[None, :]
            total += high(b.to(tl.uint32)) * x5[None, :]
            total += low((b >> 32).to(tl.uint32)) * x6[None, :]
            total += high((b >> 32).to(tl.uint32)) * x7[None, :]
        a, b, scale = next_a, next_b, next_scale
    result = tl.sum(total, 1)
    if FORMAT == "nvfp4":
        result *= 2.0**66
    elif FORMAT == "fp8":
        result *= 2.0**60
    return result
