"""Quantize and dequantize in one step, in PyTorch: the values that a format leaves of a tensor.

The equations are those of `n3c.backends.safetensors.nvfp4`, to the bit; here they also take the
calibrated amax of activations, which has no place there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from n3c.ir.formats import E2M1_MAX, E4M3_MAX, FORMATS, NVFP4_BLOCK

if TYPE_CHECKING:
    from torch import Tensor


def nvfp4(x: Tensor, amax: float, block_rows: int = 1) -> Tensor:
    """Return what NVFP4 leaves of x [..., N, K] float32, in blocks of `block_rows` x 16.

    amax is the largest magnitude that the scale of the tensor, amax / 2688, is made for; of an
    activation it is calibrated, and what lies above saturates.
    """
    import torch

    if amax == 0:
        return torch.zeros_like(x)
    *outer, rows, columns = x.shape
    scale_2 = torch.tensor(amax, dtype=torch.float32) / (E2M1_MAX * E4M3_MAX)
    tiles = x.reshape(*outer, rows // block_rows, block_rows, columns // NVFP4_BLOCK, NVFP4_BLOCK)
    block_amax = tiles.abs().amax(dim=(-3, -1), keepdim=True)
    scale = (block_amax / (E2M1_MAX * scale_2)).clamp(2.0**-9, E4M3_MAX).to(torch.float8_e4m3fn).float()
    scale = torch.where(block_amax == 0, 1.0, scale)
    return (_e2m1(tiles / (scale * scale_2)) * scale * scale_2).reshape(x.shape)


def _e2m1(y: Tensor) -> Tensor:
    """Round to 0, 0.5, 1, 1.5, 2, 3, 4, 6: nearest, ties to the even code, saturating."""
    import torch

    y = y.clamp(-6, 6)
    size = y.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return (y / step).round() * step


def fp8(x: Tensor, amax: float) -> Tensor:
    """Return what per-tensor FP8 (E4M3, scale amax / 448) leaves of x, float32 of any shape."""
    import torch

    if amax == 0:
        return torch.zeros_like(x)
    scale = torch.tensor(amax, dtype=torch.float32) / E4M3_MAX
    return (x / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float() * scale


def weight(w: Tensor, format_: str, block_rows: int) -> Tensor:
    """Return what `format_` leaves of one matrix w [N, K] float32, or of each of a stack [E, N, K]."""
    import torch

    if format_ == "bf16":
        return w.to(torch.bfloat16).float()
    if w.dim() == 3:
        return torch.stack([weight(matrix, format_, block_rows) for matrix in w])
    amax = float(w.abs().max())
    return nvfp4(w, amax, block_rows) if FORMATS[format_].blocked else fp8(w, amax)


def activation(x: Tensor, format_: str, amax: float) -> Tensor:
    """Return what a linear of `format_` reads of its input x [..., K] float32, whose calibrated amax is given."""
    if FORMATS[format_].input_divisor is None:
        return x
    return nvfp4(x.reshape(-1, x.shape[-1]), amax).reshape(x.shape) if FORMATS[format_].blocked else fp8(x, amax)
