"""What launch functions share: sizes of blocks, and the types that products are computed in."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter, which has no products of bfloat16."""

SMS = 1 if INTERPRETED else 132
"""Multiprocessors, of an H100: grids are made large enough to keep them all busy."""


def product_type(x: Tensor) -> Any:
    """Return the type of the operands of `tl.dot` for activations x; sums are always float32."""
    return tl.bfloat16 if x.dtype == torch.bfloat16 and not INTERPRETED else tl.float32


def has_wide_products(x: Tensor) -> bool:
    """Return whether x's GPU multiplies out of shared memory (SM 90 and 100), not out of registers alone.

    So does one that kernels are compiled for without being there.
    """
    return not x.is_cuda or torch.cuda.get_device_capability(x.device)[0] in (9, 10)


def power_of_two(size: int) -> int:
    """Return the smallest power of two that is at least `size`: the sides of a tile are powers of two."""
    return 1 << max(size - 1, 0).bit_length()


def ceil_div(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)
