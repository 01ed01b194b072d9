"""Activations as formats hold them, before the scale of the tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from n3c.ir.formats import E2M1_MAX, E4M3_MAX, NVFP4_BLOCK

_E2M1_BOUNDS = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
"""Halfway between neighbours; a value on one of them goes to the neighbour of even code."""
_E2M1_VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def in_fp8(x: Tensor) -> Tensor:
    """Return float32 x rounded to E4M3."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()


def in_nvfp4(x: Tensor) -> Tensor:
    """Return x [..., K] as E2M1 codes times E4M3 scales of 16 hold it."""
    blocks: Tensor = x.unflatten(-1, (-1, NVFP4_BLOCK))
    step = in_fp8(blocks.abs().amax(-1, keepdim=True) / E2M1_MAX)
    return (_in_e2m1(blocks, step) * step).flatten(-2)


def _in_e2m1(blocks: Tensor, step: Tensor) -> Tensor:
    """Return blocks / step rounded to E2M1."""
    ratio = torch.where(step > 0, blocks / step, 0.0).clamp(-E2M1_MAX, E2M1_MAX)
    size = ratio.abs()
    code = torch.bucketize(size, _E2M1_BOUNDS)  # a tie goes down, and up where that is the even code
    code += (code < len(_E2M1_BOUNDS)) & (code % 2 == 1) & (size == _E2M1_BOUNDS[code.clamp(max=6)])
    return torch.copysign(_E2M1_VALUES[code], ratio)


def can_tip(x: Tensor, distance: Tensor, format: str) -> Tensor:
    """Return where numbers up to `distance` from x [..., K] may be rounded otherwise than x; zeros count as exact."""
    if format == "fp8":
        return (in_fp8(x - distance) != in_fp8(x + distance)) & (x != 0)
    blocks, near = x.unflatten(-1, (-1, NVFP4_BLOCK)), distance.expand_as(x).unflatten(-1, (-1, NVFP4_BLOCK))
    largest, nearest = blocks.abs().amax(-1, keepdim=True), near.amax(-1, keepdim=True)
    low, high = (in_fp8(peak / E2M1_MAX) for peak in (largest - nearest, largest + nearest))
    tips: Tensor = (low != high) | (_in_e2m1(blocks - near, low) != _in_e2m1(blocks + near, low))
    tips &= blocks != 0
    return tips.flatten(-2)


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"fp8": in_fp8, "nvfp4": in_nvfp4}
"""Format → what it makes of float32 numbers that were divided by the scale of the tensor."""
