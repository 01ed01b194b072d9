"""A weight as a checkpoint stores it: codes and scales on a device, in one of the formats of [quantization]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from n3c.ir.formats import NVFP4_BLOCK

Format = Literal["bf16", "fp8", "nvfp4"]

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of FP4 codes; bit 3 is the sign."""


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A matrix [N, K], or one for each expert [E, N, K].

        bf16    data
        fp8     data * scale
        nvfp4   e2m1(data) * e4m3(block_scales) * scale
    """

    format: Format
    data: Tensor
    """bf16: bfloat16 [..., N, K]; fp8: the E4M3 bytes, uint8 [..., N, K]; nvfp4: uint8 [..., N, K/2], two codes a byte,
    the first in the low nibble."""
    block_scales: Tensor | None
    """nvfp4: E4M3 bytes, uint8 [..., N, K/16]."""
    scale: Tensor | None
    """fp8, nvfp4: float32, one a matrix: [] or [E]."""
    shape: tuple[int, ...]
    """[N, K] or [E, N, K], in weights."""

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the values of all weights; exact in float32, rounded once in another type."""
        if self.scale is None:
            return self.data.to(dtype)
        scale = self.scale[..., None, None]
        if self.block_scales is None:
            return (self.data.view(torch.float8_e4m3fn).float() * scale).to(dtype)
        magnitudes = torch.tensor(E2M1, device=self.data.device)
        table = torch.cat([magnitudes, -magnitudes])
        codes = torch.stack((self.data & 15, self.data >> 4), dim=-1).flatten(-2)
        blocks = table[codes.int()].unflatten(-1, (-1, NVFP4_BLOCK))
        steps = self.block_scales.view(torch.float8_e4m3fn).float()
        return ((blocks * steps[..., None]).flatten(-2) * scale).to(dtype)
