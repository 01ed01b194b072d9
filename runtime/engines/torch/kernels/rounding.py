"""Activations as the format of a weight holds them: codes times scales, in one pass.

    nvfp4   y = e2m1(x / scale / step) step scale,  step = e4m3(max |x / scale| / 6) of each 16 inputs
    fp8     y = e4m3(x / scale) scale

    x, y [.., K], scale [], in float32

Bytes moved: x read, y written. The results are those of `activations.Activation.rounded` bit for bit: what it divides
is divided here, and all else is exact.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activations import Activation
from .launching import begin, ceil_div, overlapping, power_of_two

BLOCK = 512
"""Numbers of a program: few, so that one row is spread over many multiprocessors."""


@triton.jit
def nearest(x, MOST: tl.constexpr, LEAST: tl.constexpr, MANTISSA: tl.constexpr):
    """Return the number next to x, ties to even, of a format with so many bits of mantissa.

    MOST is its largest number, LEAST its smallest normal one. Both steps, by a power of two and by 1.5 2^23, round
    nothing but what is to be rounded.
    """
    x = tl.minimum(tl.maximum(x, -MOST), MOST)
    power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)  # 2^⌊log₂ |x|⌋
    power = tl.maximum(power, LEAST)
    of_unit = ((254 << 23) - power.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True) * (1 << MANTISSA)
    count = (x * of_unit + 12582912.0) - 12582912.0
    return count * (power * (1.0 / (1 << MANTISSA)))


@triton.jit
def nvfp4(value):
    """Return the numbers of E2M1 [BLOCKS, 16] next to value over the steps of its blocks, and the steps [BLOCKS]."""
    step = nearest(tl.math.div_rn(tl.max(tl.abs(value), 1), 6.0), 448.0, 2.0**-6, 3)
    every = tl.broadcast_to(step[:, None], value.shape)
    ratio = tl.where(every > 0, tl.math.div_rn(value, tl.where(every > 0, every, 1.0)), 0.0)
    return nearest(ratio, 6.0, 1.0, 1), step


@triton.jit
def rounding_kernel(x, scale, y, SIZE, FORMAT: tl.constexpr, BLOCKS: tl.constexpr):
    """Write BLOCKS times 16 numbers of y."""
    begin()
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    at = block[:, None] * 16 + tl.arange(0, 16)[None, :]
    inside = at < SIZE
    given = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    one = tl.load(scale)
    value = given * tl.math.div_rn(1.0, one)
    if FORMAT == "nvfp4":
        number, step = nvfp4(value)
        value = number * step[:, None]
    else:
        value = nearest(value, 448.0, 2.0**-6, 3)
    value = tl.where(given == given, value * one, given)  # NaN stays
    tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)


def rounded(activation: Activation | None, x: Tensor) -> Tensor:
    """Return x [.., K] rounded where there is an activation's format, else as it is.

    K is a multiple of 16 for `nvfp4`.
    """
    if activation is None:
        return x
    x = x.contiguous()
    y = torch.empty_like(x)
    blocks = min(power_of_two(ceil_div(x.numel(), 16)), BLOCK // 16)
    rounding_kernel[(ceil_div(x.numel(), 16 * blocks),)](
        x, activation.scale, y, x.numel(), activation.format, blocks, num_warps=2, **overlapping(x)
    )
    return y
