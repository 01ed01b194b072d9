"""Stored weights as numbers in registers, in the two shapes that products need.

E2M1 is s e e m and E4M3 is s e e e e m m m. Put where bfloat16 has its sign, the low bits of its exponent and the
high bits of its mantissa, both are their value times a power of two, numbers below the normal ones included:

    bits of bfloat16   s.....ee m......   e2m1(code) · 2^-126
                       s...eeee mmm....   e4m3(code) · 2^-120

so one instruction moves the sign of two codes and one their rest, for words of 32 bits that hold both. The power of
two goes elsewhere: into the activations, the block scale or the result, always exactly. Where products are computed
the result is far from the ends of float32's range.

Two shapes. For one row of activations, `row_product` multiplies in float32 lane by lane: a thread loads 16 bytes of
each of BN rows of the matrix, and the activations that belong to them once, without moving anything between
threads. For more rows, `weight_tile` makes a tile of numbers for the tensor cores, whose 16 rows cost the same as one.
"""

import triton
import triton.language as tl

from .launching import PTX, prefetch, wait_for_previous

X_SCALE = tl.constexpr(2.0**60)
"""What activations are multiplied by, so that products with E2M1 and E4M3 codes do not vanish."""


@triton.jit
def pair_e2m1(word, PLACE: tl.constexpr):
    """Return the codes PLACE and PLACE + 4 of the eight in `word`, as two bfloat16 in 32 bits."""
    rest = word << (6 - 4 * PLACE) if PLACE < 2 else word >> (4 * PLACE - 6)
    return ((word << (12 - 4 * PLACE)) & 0x80008000) | (rest & 0x01C001C0)


@triton.jit
def pair_e4m3(word, PLACE: tl.constexpr):
    """Return the codes PLACE and PLACE + 2 of the four in `word`, as two bfloat16 in 32 bits."""
    rest = word << 4 if PLACE == 0 else word >> 4
    return ((word << (8 - 8 * PLACE)) & 0x80008000) | (rest & 0x07F007F0)


@triton.jit
def low(pair):
    """Return the lower bfloat16 of `pair` as float32."""
    return (pair << 16).to(tl.float32, bitcast=True)


@triton.jit
def high(pair):
    """Return the upper bfloat16 of `pair` as float32."""
    return (pair & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def lower(word):
    """Return the lower float32 of a word of 64 bits."""
    return word.to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def upper(word):
    """Return the upper float32 of a word of 64 bits."""
    return (word >> 32).to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def block_scale_bits(code):
    """Return the values of E4M3 codes times 2^-120 in float32, without their signs; higher bits may be anything."""
    return ((code.to(tl.uint32) & 0x7F) << 20).to(tl.float32, bitcast=True)


@triton.jit
def block_scale(code):
    """Return the values of E4M3 codes in float32, without their signs; higher bits may be anything."""
    return block_scale_bits(code) * 2.0**120


# One row of activations


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


# More rows


@triton.jit
def lower_half(pair, TYPE: tl.constexpr):
    """Return the lower bfloat16 of `pair`, in TYPE."""
    return pair.to(tl.uint16).to(tl.bfloat16, bitcast=True) if tl.bfloat16 == TYPE else low(pair)


@triton.jit
def upper_half(pair, TYPE: tl.constexpr):
    """Return the upper bfloat16 of `pair`, in TYPE."""
    return (pair >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True) if tl.bfloat16 == TYPE else high(pair)


TWO_PRODUCTS = tl.constexpr(
    """{
    .reg .b32 both, zero;
    prmt.b32 both, $2, $2, 0x3232;
    mov.b32 zero, 0x80008000;
    fma.rn.bf16x2 $0, $1, both, zero;
    }"""
)
"""Two bfloat16 times the upper half of a word."""


@triton.jit
def times(pair, step, TYPE: tl.constexpr):
    """Return both bfloat16 of `pair` times step, a float32 that bfloat16 has, in TYPE."""
    if PTX and tl.bfloat16 == TYPE:
        # Two in one instruction; of two products by themselves the compiler swaps the halves, before and after.
        pair = tl.inline_asm_elementwise(
            TWO_PRODUCTS, "=r,r,r", [pair, step.to(tl.uint32, bitcast=True)], dtype=tl.uint32, is_pure=True, pack=1
        )
        lower_one, upper_one = lower_half(pair, TYPE), upper_half(pair, TYPE)
    else:
        lower_one, upper_one = (low(pair) * step).to(TYPE), (high(pair) * step).to(TYPE)
    return lower_one, upper_one


@triton.jit
def weight_tile(
    data,
    scales,
    rows,
    first,
    K: tl.constexpr,
    FORMAT: tl.constexpr,
    TYPE: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PAIRED: tl.constexpr,
):
    """Return a tile [BN, BK] of a matrix in TYPE: `rows` [BN], and the columns from `first` on, zeros after K.

    What is returned is the weight before the matrix' scale times 2^-16 (`nvfp4`) or 2^-120 (`fp8`), exactly. `data`
    points to int32 in both, to the numbers themselves in `bf16`. PAIRED: of each eight columns of `nvfp4` the order is
    that of `paired`, in which two numbers of an instruction's operand lie as they are unpacked.
    """
    if FORMAT == "nvfp4":
        words = first // 8 + tl.arange(0, BK // 8)
        word = tl.load(data + rows[:, None] * (K // 8) + words[None, :], mask=(words < K // 8)[None, :], other=0)
        word = word.to(tl.uint32, bitcast=True)
        blocks = first // 16 + tl.arange(0, BK // 16)
        code = tl.load(scales + rows[:, None] * (K // 16) + blocks[None, :], mask=(blocks < K // 16)[None, :], other=0)
        step = block_scale(code) * 2.0**110  # E2M1's 2^126 would leave the range
        step = tl.reshape(tl.broadcast_to(step[:, :, None], [BN, BK // 16, 2]), [BN, BK // 8])
        a, e = times(pair_e2m1(word, 0), step, TYPE)
        b, f = times(pair_e2m1(word, 1), step, TYPE)
        c, g = times(pair_e2m1(word, 2), step, TYPE)
        d, h = times(pair_e2m1(word, 3), step, TYPE)
        values = tl.join(tl.join(tl.join(a, e), tl.join(c, g)), tl.join(tl.join(b, f), tl.join(d, h)))
        values = tl.permute(values, [0, 1, 3, 4, 2]) if PAIRED else values
        tile = tl.reshape(values, [BN, BK])
    elif FORMAT == "fp8":
        words = first // 4 + tl.arange(0, BK // 4)
        word = tl.load(data + rows[:, None] * (K // 4) + words[None, :], mask=(words < K // 4)[None, :], other=0)
        word = word.to(tl.uint32, bitcast=True)
        pair = pair_e4m3(word, 0)
        even = tl.join(lower_half(pair, TYPE), upper_half(pair, TYPE))  # codes 0 and 2
        pair = pair_e4m3(word, 1)
        odd = tl.join(lower_half(pair, TYPE), upper_half(pair, TYPE))  # 1 and 3
        tile = tl.reshape(tl.join(even, odd), [BN, BK])
    else:
        columns = first + tl.arange(0, BK)
        at = data + rows[:, None] * K + columns[None, :]
        tile = tl.load(at, mask=(columns < K)[None, :], other=0.0).to(TYPE)
    return tile


@triton.jit
def paired(x):
    """Return x [BM, BK] with each eight columns in the order 0 4 1 5 2 6 3 7: those of `pair_e2m1` side by side."""
    halves = tl.reshape(x, [x.shape[0], x.shape[1] // 8, 2, 4])
    return tl.reshape(tl.permute(halves, [0, 1, 3, 2]), [x.shape[0], x.shape[1]])


@triton.jit
def prefetch_tile(data, rows, first, K: tl.constexpr, FORMAT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Ask for the codes of the tile that `weight_tile` returns, lines of 128 bytes, into L2."""
    LINE: tl.constexpr = 128 // (4 if FORMAT != "bf16" else data.dtype.element_ty.primitive_bitwidth // 8)
    PER_ELEMENT: tl.constexpr = 8 if FORMAT == "nvfp4" else (4 if FORMAT == "fp8" else 1)
    LINES: tl.constexpr = triton.cdiv(BK // PER_ELEMENT, LINE)
    at = tl.minimum(first // PER_ELEMENT + LINE * tl.arange(0, LINES), K // PER_ELEMENT - 1)
    prefetch(data + rows[:, None] * (K // PER_ELEMENT) + at[None, :])


@triton.jit
def tile_product(
    x, x_rows, x_valid, data, scales, rows, first, last,
    K: tl.constexpr, FORMAT: tl.constexpr, TYPE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Return [BM, BN] float32: rows `x_rows` [BM] of x [.., K] times `rows` [BN] of a matrix, before its scale.

    Sums over the columns of the tiles `first` … `last` - 1 of BK; rows of x that are not valid are read as zeros.
    """
    # Few rows are the narrow side of an instruction, down to 8 of them; weights then stay in the registers that they
    # are dequantized in, as its wide side.
    PAIRED: tl.constexpr = FORMAT == "nvfp4" and BM < 64
    total = tl.zeros([BN, BM] if BM < 64 else [BM, BN], tl.float32)
    for tile in range(first, last):
        k = tile * BK  # a multiple of BK, as the compiler sees: it then loads 16 bytes at once
        columns = k + tl.arange(0, BK)
        mask = x_valid[:, None] & (columns < K)[None, :]
        x_tile = tl.load(x + x_rows[:, None] * K + columns[None, :], mask=mask, other=0.0)
        if FORMAT == "fp8":
            x_tile = x_tile.to(tl.float32) * X_SCALE
        x_tile = x_tile.to(TYPE)
        if PAIRED:
            x_tile = paired(x_tile)
        w_tile = weight_tile(data, scales, rows, k, K, FORMAT, TYPE, BN, BK, PAIRED)
        if BM < 64:
            total = tl.dot(w_tile, tl.trans(x_tile), total, input_precision="ieee")
        else:
            total = tl.dot(x_tile, tl.trans(w_tile), total, input_precision="ieee")
    if FORMAT == "nvfp4":
        total *= 2.0**16
    elif FORMAT == "fp8":
        total *= 2.0**60
    return tl.trans(total) if BM < 64 else total
