"""NVFP4 and FP8 packing, compiled by numba: the format of `nvfp4.py` to the bit, at a good part of memory speed.

Weights come as their bits, [N, K] of uint16 (BF16) or uint32 (float32). A row at a time is widened to
float32 in a buffer of K elements that stays in the first cache, so a BF16 weight is never copied as
float32. Every loop is one that LLVM turns into vector code; nothing is reassociated, so results are the
same on every machine. All functions release the GIL: callers share rows among threads.

E2M1 is rounded by adding and subtracting 2²² (2²³, 2²⁴), whose unit in the last place is the grid's
0.5 (1, 2): nearest, ties to even, as IEEE rounds.
"""

# pyright: reportUntypedFunctionDecorator=false, reportUnknownMemberType=false
from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import ml_dtypes
import numba
import numpy as np
from numpy.typing import NDArray

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """Compile on first use; the machine code is kept on disk for the next process."""
    return cast("F", numba.njit(nogil=True, cache=True, error_model="numpy")(function))


Bits = NDArray[np.uint16] | NDArray[np.uint32]
Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

BLOCK = 16
E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
"""Values of the codes; 0x7f and 0xff are NaN."""

_HALF, _ONE, _TWO = np.float32(2**22), np.float32(2**23), np.float32(2**24)  # with the units 0.5, 1 and 2
_MOST = np.float32(2**23 + 7)
_F0, _F2, _F4, _F6, _F8 = np.float32(0), np.float32(2), np.float32(4), np.float32(6), np.float32(8)
_INV2 = np.float32(0.5)
_E4M3_TINY, _E4M3_NORMAL, _E4M3_MAX = np.float32(2**-9), np.float32(2**-6), np.float32(448)
_UNIT_2_9, _512 = np.float32(2**14), np.float32(512)  # 2¹⁴ has the unit 2⁻⁹ in the last place


@compiled
def widen(row: Bits, to: Floats, to_bits: NDArray[np.uint32]) -> None:
    """Write one row of bits as float32; `to_bits` is a view of `to`."""
    if row.itemsize == 2:
        for i in range(row.size):
            to_bits[i] = np.uint32(row[i]) << np.uint32(16)
    else:
        for i in range(row.size):
            to_bits[i] = row[i]


@compiled
def block_maxima(bits: Bits, out: Bits) -> None:
    """Write the largest magnitude of each 1x16 block, as bits: `out` [N, K/16] of the same type.

    Magnitudes order as their bits do; NaN and infinity are above everything finite.
    """
    rows, columns = bits.shape
    if bits.itemsize == 2:
        keep = np.uint16(0x7FFF)
        for r in range(rows):
            for b in range(columns // 16):
                most = np.uint16(0)
                for j in range(16):
                    most = max(most, np.uint16(bits[r, 16 * b + j] & keep))
                out[r, b] = most
    else:
        keep32 = np.uint32(0x7FFFFFFF)
        for r in range(rows):
            for b in range(columns // 16):
                most32 = np.uint32(0)
                for j in range(16):
                    most32 = max(most32, np.uint32(bits[r, 16 * b + j] & keep32))
                out[r, b] = most32


@compiled
def largest(bits: Bits) -> int:
    """Return the largest magnitude of a contiguous [n], as bits."""
    if bits.itemsize == 2:
        most = np.uint16(0)
        for i in range(bits.size):
            most = max(most, np.uint16(bits[i] & np.uint16(0x7FFF)))
        return int(most)
    most32 = np.uint32(0)
    for i in range(bits.size):
        most32 = max(most32, np.uint32(bits[i] & np.uint32(0x7FFFFFFF)))
    return int(most32)


@compiled
def tile_maxima(maxima: Bits) -> None:
    """Give each of 16 rows of blocks the maximum of all 16, in place: 1x16 maxima become 16x16 ones."""
    rows, blocks = maxima.shape
    for top in range(0, rows, 16):
        for r in range(top + 1, top + 16):
            for b in range(blocks):
                maxima[top, b] = max(maxima[top, b], maxima[r, b])
        for r in range(top + 1, top + 16):
            for b in range(blocks):
                maxima[r, b] = maxima[top, b]


@compiled
def nominal_scales(maxima: Bits, scale_2: np.float32, out: Bytes) -> None:
    """Write the E4M3 code of each block's scale, amax / (6 · scale_2) to nearest; 1.0 for a block of zeros."""
    rows, blocks = maxima.shape
    s = np.empty(blocks, np.float32)
    bits = s.view(np.uint32)
    divisor = np.float32(_F6 * scale_2)
    for r in range(rows):
        widen(maxima[r], s, bits)
        for b in range(blocks):
            s[b] = s[b] / divisor
        for b in range(blocks):
            v = s[b] if s[b] > _E4M3_TINY else _E4M3_TINY
            s[b] = np.float32(1) if s[b] == _F0 else (v if v < _E4M3_MAX else _E4M3_MAX)
        for b in range(blocks):
            small = np.uint8(((s[b] + _UNIT_2_9) - _UNIT_2_9) * _512) if s[b] < _E4M3_NORMAL else np.uint8(0)
            u = bits[b]
            normal = ((u + np.uint32(0x7FFFF) + ((u >> np.uint32(20)) & np.uint32(1))) >> np.uint32(20)) - np.uint32(
                960
            )
            out[r, b] = small if s[b] < _E4M3_NORMAL else np.uint8(normal)


@compiled
def fill_steps(codes: Bytes, table: Floats, step: Floats) -> None:
    """Write the step of each block's code 16 times."""
    for b in range(codes.size):
        s = table[codes[b]]
        for j in range(16):
            step[16 * b + j] = s


@compiled
def rounded(a: np.float32) -> np.float32:
    """Round a ≥ 0 to E2M1."""
    a = a if a < _F6 else _F6
    fine, middle, coarse = (a + _HALF) - _HALF, (a + _ONE) - _ONE, (a + _TWO) - _TWO
    return fine if a < _F2 else (middle if a < _F4 else coarse)


@compiled
def pack_rows(bits: Bits, scales: Bytes, table: Floats, out: Bytes) -> None:
    """Write the packed codes e2m1(w / step), two a byte: `out` [N, K/2].

    `scales` [N, K/16] are E4M3 codes and `table` [256] their steps, f32(code) · scale_2.
    """
    rows, columns = bits.shape
    w, shifted, codes = np.empty(columns, np.float32), np.empty(columns, np.float32), np.empty(columns, np.uint8)
    w_bits, shifted_bits, pairs = w.view(np.uint32), shifted.view(np.uint32), codes.view(np.uint16)
    w_blocks, shifted_blocks = w.reshape(-1, 16), shifted.reshape(-1, 16)
    for r in range(rows):
        widen(bits[r], w, w_bits)
        for b in range(columns // 16):
            step, block, to = table[scales[r, b]], w_blocks[b], shifted_blocks[b]
            for j in range(16):
                y = block[j] / step
                a = abs(y)
                # the codes are concave in a: the least of the lines 2a, a + 2 and a/2 + 4, each rounded to an
                # integer by adding 2²³, whose float32 has that integer in its lowest bits
                code, middle, coarse = a + a + _ONE, (a + _ONE) + _F2, (a * _INV2 + _ONE) + _F4
                code = code if code < middle else middle
                code = code if code < coarse else coarse
                code = code if code < _MOST else _MOST
                to[j] = code + (_F8 if y < _F0 else _F0)
        for i in range(columns):
            codes[i] = np.uint8(shifted_bits[i])
        for i in range(columns // 2):
            out[r, i] = np.uint8(pairs[i] | (pairs[i] >> np.uint16(4)))


@compiled
def add_noise(bits: Bits, scales: Bytes, table: Floats, sums: NDArray[np.float64]) -> None:
    """Add Σ w² and Σ (dequantized − w)² of these rows to `sums` [2]; always in the same order."""
    rows, columns = bits.shape
    w, step = np.empty(columns, np.float32), np.empty(columns, np.float32)
    w_bits = w.view(np.uint32)
    signal, noise = np.zeros(16, np.float64), np.zeros(16, np.float64)
    for r in range(rows):
        widen(bits[r], w, w_bits)
        fill_steps(scales[r], table, step)
        for i in range(columns):
            magnitude = abs(w[i])
            step[i] = rounded(magnitude / step[i]) * step[i] - magnitude
        for b in range(columns // 16):
            for j in range(16):
                x, e = np.float64(w[16 * b + j]), np.float64(step[16 * b + j])
                signal[j] += x * x
                noise[j] += e * e
    for j in range(16):
        sums[0] += signal[j]
        sums[1] += noise[j]


@compiled
def pack_fp8_rows(bits: Bits, scale: np.float32, out: Bytes, sums: NDArray[np.float64]) -> None:
    """Write e4m3(w / scale), the quotient rounded to BF16 first where w is BF16, as PyTorch and ModelOpt do.

    `out` [N, K]. Adds Σ w² and Σ (dequantized − w)² to `sums` [2].
    """
    rows, columns = bits.shape
    w, y = np.empty(columns, np.float32), np.empty(columns, np.float32)
    w_bits, y_bits = w.view(np.uint32), y.view(np.uint32)
    signal, noise = 0.0, 0.0
    for r in range(rows):
        widen(bits[r], w, w_bits)
        for i in range(columns):
            y[i] = w[i] / scale
        if bits.itemsize == 2:
            for i in range(columns):
                u = y_bits[i]
                u = u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))
                y_bits[i] = u & np.uint32(0xFFFF0000)
        for i in range(columns):
            u = y_bits[i] & np.uint32(0x7FFFFFFF)
            a = abs(y[i])
            small = np.uint8(np.int32(((a + _UNIT_2_9) - _UNIT_2_9) * _512)) if a < _E4M3_NORMAL else np.uint8(0)
            normal = ((u + np.uint32(0x7FFFF) + ((u >> np.uint32(20)) & np.uint32(1))) >> np.uint32(20)) - np.uint32(
                960
            )
            code = small if a < _E4M3_NORMAL else np.uint8(normal)
            out[r, i] = code | np.uint8((y_bits[i] >> np.uint32(24)) & np.uint32(0x80))
        for i in range(columns):
            x, e = np.float64(w[i]), np.float64(E4M3[out[r, i]] * scale - w[i])
            signal += x * x
            noise += e * e
    sums[0] += signal
    sums[1] += noise
