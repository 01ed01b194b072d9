"""Packing weights in NVFP4 and FP8, all of one or a band of its rows: numpy arrays in, what is stored out.

The arithmetic is that of packing_kernels.py, whose functions release the GIL: callers share rows among threads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, cast

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from n3c.ir.formats import E2M1_MAX, E4M3_MAX, NVFP4_BLOCK

from .nvfp4 import Nvfp4Matrix
from .packing_kernels import (
    E4M3,
    Bits,
    Floats,
    block_maxima_bits,
    largest_bits,
    noise,
    nominal_scales,
    pack_fp8,
    pack_rows,
    search_scales,
    signal,
    tile_maxima,
)

Search = Literal["none", "mse"]
Array = NDArray[Any]

SEARCH_MAX = 256.0
"""The nominal scale of the largest block where scales are searched: 448 without search."""

KINDS: dict[Any, Any] = {np.dtype(ml_dtypes.bfloat16): np.uint16, np.dtype(np.float32): np.uint32}
"""Element types that are packed without a copy, and the integers of their bits. float16 is widened."""


class NotFiniteError(ValueError):
    """A weight holds NaN or infinity at `index`."""

    def __init__(self, index: tuple[int, ...], value: float) -> None:
        super().__init__(f"it holds {value} at {list(index)}")
        self.index = index
        self.value = value


@dataclass(frozen=True, slots=True)
class Packed:
    """A band of rows as it is stored, and what packing cost: sums of squares, from which SQNRs are made."""

    codes: NDArray[np.uint8]
    """[N, K/2] of NVFP4, [N, K] of FP8."""
    scales: NDArray[np.uint8]
    """[N, K/16] E4M3 codes; empty for FP8."""
    signal: float = math.nan
    """NaN where it was not measured, as the noise."""
    noise: float = math.nan
    other_noise: float = 0.0
    """Of the other block shape, with the same search; 0 where it was not asked for, or rows do not divide."""


def as_bits(weight: Array) -> Bits:
    """Return the bits of a weight, [N, K] of uint16 or uint32, without a copy where its type allows."""
    if weight.dtype not in KINDS:
        weight = weight.astype(np.float32)
    return cast("Bits", np.ascontiguousarray(weight).view(KINDS[weight.dtype]))


def magnitude(bits: int, kind: Any) -> np.float32:
    """Return the magnitude that `largest` found, as a float32."""
    shift = 16 if np.dtype(kind) == np.uint16 else 0
    return cast("np.float32", np.array([bits << shift], np.uint32).view(np.float32)[0])


def largest(weight: Array) -> np.float32:
    """Return the largest magnitude; NotFiniteError names the first NaN or infinity."""
    bits = as_bits(weight)
    found = magnitude(largest_bits(bits.reshape(-1)), bits.dtype) if bits.size else np.float32(0)
    if not np.isfinite(found):
        where = np.unravel_index(int(np.argmin(np.isfinite(weight.astype(np.float32)))), weight.shape)
        index = tuple(int(i) for i in where)
        raise NotFiniteError(index, float(weight[index]))
    return found


def block_maxima(weight: Array) -> tuple[Bits, np.float32]:
    """Return the largest magnitude of each 1x16 block of [N, K], as bits, and that of all; in one pass.

    NotFiniteError names the first NaN or infinity.
    """
    bits = as_bits(weight)
    maxima = cast("Bits", np.empty((bits.shape[0], bits.shape[1] // NVFP4_BLOCK), bits.dtype))
    block_maxima_bits(bits, maxima)
    amax = magnitude(largest_bits(maxima.reshape(-1)), bits.dtype)
    return maxima, amax if np.isfinite(amax) else largest(weight)


def nvfp4_scale_2(amax: np.float32, search: Search) -> np.float32:
    """Return the tensor's scale: amax / (6 · 448), or / (6 · 256) for a search; 1 for a weight of zeros."""
    most = SEARCH_MAX if search == "mse" else E4M3_MAX
    return np.float32(amax / np.float32(E2M1_MAX * most)) if amax > 0 else np.float32(1)


def fp8_scale(amax: np.float32) -> np.float32:
    """Return the scale of an FP8 weight: amax / 448; 1 for a weight of zeros."""
    return np.float32(amax / np.float32(E4M3_MAX)) if amax > 0 else np.float32(1)


def pack_nvfp4_rows(
    weight: Array,
    maxima: Bits,
    scale_2: np.float32,
    block_rows: int,
    search: Search,
    *,
    measure: bool,
) -> Packed:
    """Pack whole blocks of rows [N, K] with the tensor's `scale_2`; with `measure`, sums of squares too.

    `maxima` are those of `block_maxima`, and are worked on in place.
    """
    bits = as_bits(weight)
    rows, columns = bits.shape
    other_maxima = maxima.copy() if measure else maxima
    scales, table = _scales(bits, maxima, scale_2, block_rows, search)
    codes = np.empty((rows, columns // 2), np.uint8)
    pack_rows(bits, scales, table, codes)
    if not measure:
        return Packed(codes, scales)
    other, other_rows = 0.0, 17 - block_rows
    if rows % other_rows == 0:
        other_scales, _ = _scales(bits, other_maxima, scale_2, other_rows, search)
        other = noise(bits, other_scales, table)
    return Packed(codes, scales, signal(bits), noise(bits, scales, table), other)


def _scales(
    bits: Bits, maxima: Bits, scale_2: np.float32, block_rows: int, search: Search
) -> tuple[NDArray[np.uint8], Floats]:
    """Return the code of each block and the steps of all codes; `maxima` is worked on in place."""
    if block_rows == NVFP4_BLOCK:
        tile_maxima(maxima)
    scales = np.empty(maxima.shape, np.uint8)
    nominal_scales(maxima, scale_2, scales)
    table = E4M3 * scale_2
    if search == "mse":
        unit = np.float32(min(1 / float(scale_2), 2.0**120)) if scale_2 > 0 else np.float32(1)
        search_scales(bits, scales, table, unit, block_rows)
    return scales, table


def pack_fp8_rows(weight: Array, scale: np.float32) -> Packed:
    """Pack rows [N, K] as e4m3(w / scale), with sums of squares."""
    bits = as_bits(weight)
    codes, sums = np.empty(bits.shape, np.uint8), np.zeros(2)
    pack_fp8(bits, scale, codes, sums)
    return Packed(codes, np.empty((0, 0), np.uint8), float(sums[0]), float(sums[1]))


def pack_nvfp4(weight: Array, block_rows: int, search: Search = "none") -> Nvfp4Matrix:
    """Pack a whole weight [N, K]; ValueError where it does not divide, NotFiniteError where it is not finite."""
    rows, columns = weight.shape
    if columns % NVFP4_BLOCK or rows % block_rows:
        raise ValueError(f"[{rows}, {columns}] does not divide into blocks of {block_rows}x{NVFP4_BLOCK}")
    maxima, amax = block_maxima(weight)
    scale_2 = nvfp4_scale_2(amax, search)
    packed = pack_nvfp4_rows(weight, maxima, scale_2, block_rows, search, measure=False)
    return Nvfp4Matrix(packed.codes, packed.scales.view(ml_dtypes.float8_e4m3fn), scale_2)


def nvfp4_noise(weight: Array, block_rows: int, search: Search = "none") -> tuple[float, float]:
    """Return Σ w² and Σ (dequantized − w)² of a weight [N, K] in NVFP4."""
    maxima, amax = block_maxima(weight)
    packed = pack_nvfp4_rows(weight, maxima, nvfp4_scale_2(amax, search), block_rows, search, measure=True)
    return packed.signal, packed.noise


def fp8_noise(weight: Array) -> tuple[float, float]:
    """Return Σ w² and Σ (dequantized − w)² of a weight [N, K] in per-tensor FP8."""
    packed = pack_fp8_rows(weight, fp8_scale(largest(weight)))
    return packed.signal, packed.noise
