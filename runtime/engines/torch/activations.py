"""Activations that the format of a weight quantizes: rounded in front of its linear, in every entry point alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from n3c.ir.formats import E2M1_MAX, E4M3_MAX, NVFP4_BLOCK


@dataclass(frozen=True)
class Activation:
    """What a linear reads is held in a format, with one scale for the tensor."""

    format: str
    """`nvfp4` or `fp8`."""
    scale: Tensor
    """float32 []."""

    def rounded(self, x: Tensor) -> Tensor:
        """Return x [..., K] as the format holds it, in the type of x: codes times scales, computed in float32."""
        divided = x.float() * self.scale.reciprocal()
        values = _in_e4m3(divided) if self.format == "fp8" else _in_nvfp4(divided)
        return (values * self.scale).to(x.dtype)


def rounded(activation: Activation | None, x: Tensor) -> Tensor:
    """Return x rounded where there is an activation's format, else as it is."""
    return x if activation is None else activation.rounded(x)


def _in_e4m3(x: Tensor) -> Tensor:
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()


def _in_nvfp4(x: Tensor) -> Tensor:
    """Round by steps: E2M1 has those of 0.5 up to 2, of 1 up to 4, of 2 up to 6, and ties go to the even code."""
    blocks: Tensor = x.unflatten(-1, (-1, NVFP4_BLOCK))
    step = _in_e4m3(blocks.abs().amax(-1, keepdim=True) / E2M1_MAX)
    ratio = torch.where(step > 0, blocks / step, 0.0).clamp(-E2M1_MAX, E2M1_MAX)
    size = ratio.abs()
    unit = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return ((ratio / unit).round() * unit * step).flatten(-2)
