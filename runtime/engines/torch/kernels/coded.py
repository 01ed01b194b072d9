"""Products of NVFP4 weights with NVFP4 activations as what both are: whole numbers and steps of blocks.

    y = (s_x s_w / 4) sum over blocks (step_x step_w sum over the 16 of a block (2 e2m1_x) (2 e2m1_w))

Twice a number of E2M1 is a whole number from -12 to 12, so the inner sum is exact in whole numbers, and an instruction
adds four products. For the few rows of decoding, lane by lane, where a thread's instructions bound what it reads:
2.3 a weight in place of the 5.2 that numbers in float32 take, in the code for SM 90.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activations import Activation
from ..packed import PackedWeight
from .launching import PTX, begin, ceil_div, overlapping, power_of_two, wait_for_previous
from .rounding import BLOCK, nvfp4
from .rows import row_units, two_words
from .weights import block_scale_bits

STEP = tl.constexpr(2.0**60)
"""What steps of activations are stored times: their product with a step of a weight, times 2^-120, is then no
subnormal number."""

BLOCK_OF_PRODUCTS = tl.constexpr(
    """{
    .reg .b32 more, less, word, part;
    prmt.b32 part, $7, 0x0C080604, $1;
    dp4a.s32.s32 more, part, $3, 0;
    shr.u32 word, $1, 16;
    prmt.b32 part, $7, 0x0C080604, word;
    dp4a.s32.s32 more, part, $4, more;
    prmt.b32 part, $7, 0x0C080604, $2;
    dp4a.s32.s32 more, part, $5, more;
    shr.u32 word, $2, 16;
    prmt.b32 part, $7, 0x0C080604, word;
    dp4a.s32.s32 more, part, $6, more;
    xor.b32 word, $1, 0x88888888;
    prmt.b32 part, $7, 0x0C080604, word;
    dp4a.s32.s32 less, part, $3, 0;
    shr.u32 word, word, 16;
    prmt.b32 part, $7, 0x0C080604, word;
    dp4a.s32.s32 less, part, $4, less;
    xor.b32 word, $2, 0x88888888;
    prmt.b32 part, $7, 0x0C080604, word;
    dp4a.s32.s32 less, part, $5, less;
    shr.u32 word, word, 16;
    prmt.b32 part, $7, 0x0C080604, word;
    dp4a.s32.s32 less, part, $6, less;
    sub.s32 $0, more, less;
    }"""
)
"""The sum of 16 products: the codes of two words of 32 bits and the bytes of four.

A byte of the table of numbers is chosen by three bits of a code; its fourth bit, the sign, puts copies of the byte's
highest bit, which is zero, in its place. So one look gives the positive numbers, and one with all signs flipped the
negative ones.
"""


@triton.jit
def small_numbers():
    """Return the numbers of the codes 0 to 3, twice each, in bytes: in a register that the compiler knows nothing of.

    As a constant it would be moved to a register again for each look. No thread is below one in the highest place.
    """
    return tl.inline_asm_elementwise(
        "{ .reg .b32 zero; mov.u32 zero, %lanemask_lt; shr.u32 zero, zero, 31; add.u32 $0, zero, 0x03020100; }",
        "=r", [], dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def block_sums(words, first_x, second_x):
    """Return the sums [BN, KU] of 16 codes, `words` of 64 bits [BN, KU], with 16 bytes of x, [KU] of 64 bits each."""
    lower, upper = words.to(tl.uint32), (words >> 32).to(tl.uint32)
    x0, x1 = first_x.to(tl.uint32)[None, :], (first_x >> 32).to(tl.uint32)[None, :]
    x2, x3 = second_x.to(tl.uint32)[None, :], (second_x >> 32).to(tl.uint32)[None, :]
    if PTX:
        sums = tl.inline_asm_elementwise(
            BLOCK_OF_PRODUCTS,
            "=r,r,r,r,r,r,r,r",
            [lower, upper, x0, x1, x2, x3, small_numbers()],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        sums = add_eight(add_eight(tl.zeros(words.shape, tl.int32), lower, x0, x1), upper, x2, x3)
    return sums.to(tl.float32)


@triton.jit
def add_eight(sums, word, first_x, second_x):
    """Return `sums` and the products of eight codes with eight bytes, for where there is no such instruction."""
    for place in tl.static_range(8):
        byte = ((first_x if place < 4 else second_x) << (24 - 8 * (place % 4))).to(tl.int32, bitcast=True) >> 24
        code = (word >> (4 * place)) & 15
        power, half = (code >> 1) & 3, code & 1
        twice = tl.where(power == 0, half, (2 + half) << (power - tl.minimum(power, 1))).to(tl.int32)
        sums += tl.where(code < 8, twice, -twice) * byte
    return sums


@triton.jit
def coded_product(x, steps, data, scales, rows, K: tl.constexpr, BN: tl.constexpr, KU: tl.constexpr):
    """Return the products [BN] of one x [K] with `rows` [BN] of a matrix, before both scales.

    x, of bytes, and data are pointers to int64, scales to int16, two blocks each. A unit is 32 weights of a row, 16
    bytes; a tile has KU of them, 32 for each warp, so that the threads of all warps lie along K.
    """
    UNITS: tl.constexpr = K // 32
    total = tl.zeros([BN, KU], tl.float32)
    a, b, scale = row_units(data, scales, rows, 0, UNITS, "nvfp4", KU)
    wait_for_previous()
    for first in range(0, UNITS, KU):
        units = first + tl.arange(0, KU)
        inside = units < UNITS
        # What the next round needs is asked for before this one computes; after the last that is nothing.
        next_a, next_b, next_scale = row_units(data, scales, rows, first + KU, UNITS, "nvfp4", KU)
        x0, x1 = two_words(x, units, 0, inside, 4)
        x2, x3 = two_words(x, units, 1, inside, 4)
        step_at = steps + units[:, None] * 2 + tl.arange(0, 2)[None, :]
        step0, step1 = tl.split(tl.load(step_at, mask=inside[:, None], other=0.0))
        sums = block_sums(a, x0, x1)
        total += sums * (block_scale_bits(scale) * step0[None, :])
        sums = block_sums(b, x2, x3)
        total += sums * (block_scale_bits(scale >> 8) * step1[None, :])
        a, b, scale = next_a, next_b, next_scale
    # 2^120 of the weight's steps over STEP of x's, and both numbers are twice what they stand for.
    return tl.sum(total, 1) * (2.0**60 / 4)


@triton.jit
def coding_kernel(x, scale, codes, steps, SIZE, BLOCKS: tl.constexpr):
    """Write BLOCKS times 16 codes and BLOCKS steps."""
    begin()
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    at = block[:, None] * 16 + tl.arange(0, 16)[None, :]
    inside = at < SIZE
    given = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    number, step = nvfp4(given * tl.math.div_rn(1.0, tl.load(scale)))
    broken = tl.max((given != given).to(tl.int32), 1) != 0  # a NaN is its whole block's
    step = tl.where(broken, float("nan"), step * STEP)
    number = tl.where(broken[:, None], 0.0, number)
    tl.store(codes + at, (number * 2.0).to(tl.int8), mask=inside)
    tl.store(steps + block, step, mask=block * 16 < SIZE)


class Coded(NamedTuple):
    """Activations as codes: x = codes / 2 · steps / STEP · scale."""

    codes: Tensor
    """int8 [T, K]."""
    steps: Tensor
    """float32 [T, K / 16]."""
    scale: Tensor
    """float32 []."""


def can_be_coded(activation: Activation | None, weight: PackedWeight) -> bool:
    """Return whether both are NVFP4, in whole units of 16 bytes of a weight's row."""
    formats = weight.format == "nvfp4" and activation is not None and activation.format == "nvfp4"
    return formats and weight.shape[-1] % 32 == 0


def coded(activation: Activation, x: Tensor) -> Coded:
    """Return x [T, K] as codes, K a multiple of 16. The numbers are those of `Activation.rounded`, never rounded again.

    A NaN makes its block of 16 NaN.
    """
    x = x.contiguous()
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    steps = torch.empty(*x.shape[:-1], x.shape[-1] // 16, dtype=torch.float32, device=x.device)
    blocks = min(power_of_two(ceil_div(x.numel(), 16)), BLOCK // 16)
    coding_kernel[(ceil_div(x.numel(), 16 * blocks),)](
        x, activation.scale, codes, steps, x.numel(), blocks, num_warps=2, **overlapping(x)
    )
    return Coded(codes, steps, activation.scale)
