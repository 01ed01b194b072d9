"""A weight in the form in which checkpoints store it, and what its numbers are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from n3c.ir.formats import NVFP4_BLOCK

Format = Literal["bf16", "fp8", "nvfp4"]

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Values of the codes 0…7; 8…15 are their negatives."""


@dataclass(frozen=True)
class PackedWeight:
    """A matrix [N, K], or a stack of E of them, with K inputs.

    A block of `nvfp4` is 16 inputs of a row; `nvfp4` stores w = e2m1(code) · e4m3(block scale) · scale, `fp8` stores
    w = e4m3(code) · scale, and `bf16` the numbers themselves.
    """

    format: Format
    data: Tensor
    """`bf16`: [..., N, K] floats; `fp8`: [..., N, K] uint8; `nvfp4`: [..., N, K/2] uint8, low nibble first."""
    block_scales: Tensor | None
    """`nvfp4`: [..., N, K/16] uint8, the bits of E4M3."""
    scale: Tensor | None
    """`fp8` and `nvfp4`: float32, one a matrix: [] or [E]."""
    shape: tuple[int, ...]
    """[N, K] or [E, N, K]."""

    @property
    def bytes(self) -> int:
        """Return how many bytes the weight takes in memory."""
        parts = (self.data, self.block_scales, self.scale)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """Return the numbers as [N, K] or [E, N, K], computed in float32 and rounded once to `dtype`."""
        if self.format == "bf16":
            return self.data.to(dtype)
        assert self.scale is not None
        scale = self.scale.float()[..., None, None]
        if self.format == "fp8":
            return (e4m3(self.data) * scale).to(dtype)
        assert self.block_scales is not None
        codes = torch.stack([self.data & 15, self.data >> 4], dim=-1).flatten(-2)  # [..., N, K]
        table = torch.tensor([*E2M1, *(-value for value in E2M1)], device=codes.device)
        blocks = table[codes.int()].view(*self.block_scales.shape, NVFP4_BLOCK)  # [..., N, K/16, 16]
        return ((blocks * e4m3(self.block_scales)[..., None]).flatten(-2) * scale).to(dtype)


def e4m3(codes: Tensor) -> Tensor:
    """Return the float32 values of E4M3 codes, stored as bytes or as float8_e4m3fn."""
    return codes.view(torch.float8_e4m3fn).float()
