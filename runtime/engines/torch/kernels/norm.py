"""RMSNorm (Zhang and Sennrich, arXiv 1910.07467), by itself and behind the residual sum.

    y = weight x / sqrt(mean(x^2) + eps)       x [.., D], weight [D], in float32

Bytes moved: x read, y written; `add_rms_norm` also reads the residual and writes the sum. One program a row: decoding
has few of them, and their time is that of a launch, which the fused sum saves.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import begin, overlapping, power_of_two


@triton.jit
def rms_norm_kernel(x, residual, weight, y, total, D, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """Write row `program_id(0)` of y and, with ADD, of the sum of x and the residual."""
    begin()
    start = tl.program_id(0).to(tl.int64) * D
    at = tl.arange(0, BLOCK)
    inside = at < D
    value = tl.load(x + start + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + start + at, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + start + at, rounded, mask=inside)
        value = rounded.to(tl.float32)  # the norm of what later blocks read
    scale = tl.rsqrt(tl.sum(value * value, 0) / D + eps)
    factor = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + start + at, (value * scale * factor).to(y.dtype.element_ty), mask=inside)


def warps_of(block: int) -> int:
    """Return the warps of a program that holds `block` numbers: about 16 numbers a thread."""
    return min(max(block // 512, 1), 16)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return the norm of each row of x [.., D], of x's type."""
    x = x.contiguous()
    y = torch.empty_like(x)
    width = x.shape[-1]
    block = power_of_two(width)
    rms_norm_kernel[(x.numel() // width,)](
        x, x, weight, y, y, width, eps, False, block, num_warps=warps_of(block), **overlapping(x)
    )  # fmt: skip
    return y


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the norm of x + residual, of x's type, and the sum itself, of the residual's; both [.., D]."""
    x, residual = x.contiguous(), residual.contiguous()
    y, total = torch.empty_like(x), torch.empty_like(residual)
    width = x.shape[-1]
    block = power_of_two(width)
    rms_norm_kernel[(x.numel() // width,)](
        x, residual, weight, y, total, width, eps, True, block, num_warps=warps_of(block), **overlapping(x)
    )  # fmt: skip
    return y, total
