"""Products of tiles of weights on the tensor cores, for which 16 rows of activations cost the same as one."""

import triton
import triton.language as tl

from .launching import PTX, prefetch
from .weights import X_SCALE, block_scale, high, low, pair_e2m1, pair_e4m3


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
