"""NVFP4 in numpy: the format to the bit, as NVIDIA ModelOpt's `NVFP4QTensor.quantize` computes it.

    s2    = f32(amax) / (6 · 448)                       one a matrix
    s     = e4m3(clamp(amax(block) / (6 · s2), 2⁻⁹, 448))     one a block; 1.0 for an all-zero block
    code  = e2m1(w / (f32(s) · s2))                     round to nearest, ties to the even code, saturating

A block is 16 elements along K; a 16x16 block also spans 16 rows and stores its scale once for each,
so every NVFP4 reader works unchanged. An all-zero matrix gets s2 = 1 and zero codes, where ModelOpt
gives NaN. Divisions stay divisions: multiplying by reciprocals breaks ties otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from n3c.ir.formats import E2M1_MAX, E4M3_MAX, NVFP4_BLOCK

E4M3_TINY = 2.0**-9


@dataclass(frozen=True, slots=True)
class Nvfp4Matrix:
    """One quantized matrix [N, K]."""

    codes: NDArray[np.uint8]
    """[N, K/2]: two E2M1 codes a byte, the first in the low nibble."""
    scale: NDArray[np.generic]
    """[N, K/16], float8_e4m3fn."""
    scale_2: np.float32


def quantize(weight: NDArray[np.generic], block_rows: int, amax: np.float32 | None = None) -> Nvfp4Matrix:
    """Quantize `weight` [N, K], of any float type; ValueError where a dim does not divide or a value is not finite.

    `amax` is the largest magnitude of all matrices that have its scale; None: it alone has it.
    """
    w = np.asarray(weight, dtype=np.float32)
    rows, columns = w.shape
    if columns % NVFP4_BLOCK or rows % block_rows:
        raise ValueError(f"[{rows}, {columns}] does not divide into blocks of {block_rows}x{NVFP4_BLOCK}")
    tiles = np.abs(w).reshape(rows // block_rows, block_rows, columns // NVFP4_BLOCK, NVFP4_BLOCK).max(axis=(1, 3))
    largest = tiles.max(initial=np.float32(0))
    if not np.isfinite(largest):
        raise ValueError("the weight holds NaN or infinity")
    amax = largest if amax is None else amax
    if amax == 0:
        ones = np.ones((rows, columns // NVFP4_BLOCK), dtype=ml_dtypes.float8_e4m3fn)
        return Nvfp4Matrix(np.zeros((rows, columns // 2), np.uint8), ones, np.float32(1))
    scale_2 = np.float32(amax / np.float32(E2M1_MAX * E4M3_MAX))
    scale = tiles / (np.float32(E2M1_MAX) * scale_2)
    scale[tiles == 0] = 1
    stored = np.clip(scale, E4M3_TINY, E4M3_MAX).astype(ml_dtypes.float8_e4m3fn)
    stored = np.repeat(stored, block_rows, axis=0)
    step = stored.astype(np.float32) * scale_2
    ratio = w.reshape(rows, columns // NVFP4_BLOCK, NVFP4_BLOCK) / step[..., None]
    return Nvfp4Matrix(pack(e2m1_codes(ratio).reshape(rows, columns)), stored, scale_2)


def e2m1_codes(x: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Round to E2M1 codes 0…15 (bit 3 is the sign): nearest, ties to the even code, saturating at 6; -0.0 gives 0.

    NaN, the quotient 0 / 0 where a scale underflowed, gives 7 as in ModelOpt; its value is 0 with that scale.
    """
    clipped = np.clip(np.nan_to_num(x, nan=E2M1_MAX), -E2M1_MAX, E2M1_MAX) + np.float32(0)
    return clipped.astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & np.uint8(15)


def pack(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pack codes [..., K] two a byte, the first in the low nibble."""
    return codes[..., 0::2] | (codes[..., 1::2] << np.uint8(4))


def unpack(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Undo `pack`."""
    return np.stack((packed & np.uint8(15), packed >> np.uint8(4)), axis=-1).reshape(*packed.shape[:-1], -1)


def dequantize(matrix: Nvfp4Matrix) -> NDArray[np.float32]:
    """Return e2m1(code) · scale · scale_2, float32 [N, K]."""
    values = unpack(matrix.codes).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    scale = np.repeat(matrix.scale.astype(np.float32), NVFP4_BLOCK, axis=-1)
    product: NDArray[np.float32] = values * scale * matrix.scale_2
    return product
