"""What kernels and launch functions share: how kernels follow each other, sizes of blocks, and types of products.

A token is some 500 short kernels in a row. On SM 90 and later each is launched while the one before still runs
(programmatic dependent launch): it asks for weights and waits before it reads or writes anything else. Weights may be
read so early as none of these kernels writes one: a call begins with an embedding, which is launched in the usual way,
after all that came before it, new weights too.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda
from triton.language.target_info import cuda_capability_geq

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter, which has no products of bfloat16."""

PTX = tl.constexpr(not INTERPRETED and torch.version.hip is None)
"""Whether kernels may have NVIDIA's instructions: neither the interpreter nor AMD's GPUs know them."""

SMS = 1 if INTERPRETED else 132
"""Multiprocessors, of an H100: grids are made large enough to keep them all busy."""


@triton.jit
def begin():
    """Let the next kernel start, and wait until the one before has written all its results."""
    let_next_start()
    wait_for_previous()


@triton.jit
def let_next_start():
    """Let the next kernel start once all programs of this one have come here."""
    if PTX and cuda_capability_geq(9, 0):
        cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous():
    """Wait until the kernel before has written all its results. Every kernel does, so all before that have, too."""
    if PTX and cuda_capability_geq(9, 0):
        cuda.gdc_wait()


@triton.jit
def prefetch(at):
    """Ask for the lines of memory at pointers into L2."""
    if PTX and cuda_capability_geq(9, 0):
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; // dummy $0", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
        )


def overlapping(x: Tensor) -> dict[str, bool]:
    """Return the option that launches a kernel while the one before still runs, where x's GPU can."""
    return {"launch_pdl": True} if x.is_cuda and torch.cuda.get_device_capability(x.device)[0] >= 9 else {}


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
