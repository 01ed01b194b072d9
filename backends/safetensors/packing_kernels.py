"""The arithmetic of packing in NVFP4 and FP8, compiled by numba; packing.py applies it to weights.

It has the format of `nvfp4.py` to the bit, at a good part of memory speed. Weights come as their bits, [N, K] of
uint16 (BF16) or uint32 (float32). A row at a time is widened to float32 in a buffer of K elements that stays in the
first cache, so a BF16 weight is never copied as float32. Every loop is one that LLVM turns into vector code; nothing
is reassociated, so results are the same on every machine. All functions release the GIL.

Packing divides no weight: for each of the 256 block scales the bits of the largest weight that still gets each
code are found once (`bounds_of`), and a weight's code is the number of bounds that its bits are above, 16
weights an instruction. Where errors are summed, E2M1 is rounded by adding and subtracting 2²² (2²³, 2²⁴),
whose unit in the last place is the grid's 0.5 (1, 2): nearest, ties to even, as IEEE rounds.

With a search, each block takes the E4M3 scale of least squared error among the codes from two below to six above
the nominal one. The tensor's scale leaves room for them: amax / (6 · 256), so that the nominal code of the largest
block is 256 and six above is 448, E4M3's largest. The window finds what a sweep over all 126 codes finds, at a
fourteenth of its cost (docs/quantization.md has the figures). Sweeps are ModelOpt's `mse` calibration; choosing
between two scales is the paper Four Over Six (arXiv 2512.02010).

One file, as numba keeps compiled code under the name and date of the file that holds the outermost function: code
that is inlined from another file stays as it was when that one changes.
"""

# pyright: reportUntypedFunctionDecorator=false, reportUnknownMemberType=false
from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import ml_dtypes
import numba
import numpy as np
from numpy.typing import NDArray

from n3c.ir.formats import E4M3_MAX

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """Compile on first use; the machine code is kept on disk for the next process, where that can be written.

    Neither the folder of this file nor the user's cache may be: installed by root, run with a read-only home.
    """
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        return cast("F", numba.njit(cache=True, **options)(function))
    except RuntimeError:  # numba finds no place for its cache
        return cast("F", numba.njit(**options)(function))


Bits = NDArray[np.uint16] | NDArray[np.uint32]
Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Bounds = NDArray[np.int32]

E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
"""Values of the codes; 0x7f and 0xff are NaN."""

_HALF, _ONE, _TWO = np.float32(2**22), np.float32(2**23), np.float32(2**24)  # with the units 0.5, 1 and 2
_MOST = np.float32(2**23 + 7)
_F0, _F2, _F4, _F6, _F8 = np.float32(0), np.float32(2), np.float32(4), np.float32(6), np.float32(8)
_F05, _DENORMAL = np.float32(0.5), np.float32(2**-149)
_BETWEEN = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5], np.float32)  # halfway from each code to the next
_E4M3_TINY, _E4M3_NORMAL, _E4M3_MAX = np.float32(2**-9), np.float32(2**-6), np.float32(E4M3_MAX)
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
def block_maxima_bits(bits: Bits, out: Bits) -> None:
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
def largest_bits(bits: Bits) -> int:
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
def passes(quotient: np.float32, bound: int) -> bool:
    """Whether a quotient ≥ 0 is rounded to a code above `bound` (0…6), or is not zero (`bound` 7)."""
    if bound == 7:
        return bool(quotient > _F0)
    between = _BETWEEN[bound]
    return bool(quotient > between if bound % 2 == 0 else quotient >= between)  # a tie goes to the even code


@compiled
def bounds_of(table: Floats, shift: int, out: Bounds) -> None:
    """Write what weights are compared with instead of being divided: `out` [256, 8].

    For the step `table[s]`, `out[s, c]` is the largest weight that gets a code of at most `c`, as the bits of
    its magnitude without the lowest `shift` (16: BF16, 0: float32); `out[s, 7]` the largest whose quotient
    vanishes. −1 where there is none. Quotients order as weights do, so the division that the format asks for
    is done here, around each bound, and nowhere else.
    """
    w = np.empty(1, np.float32)
    bits = w.view(np.uint32)
    infinity = np.int64(0x7F800000) >> shift
    for s in range(256):
        step = table[s]
        for c in range(8):
            if not step > _F0:  # underflow: w / 0 saturates, and ModelOpt gives 0 / 0 the code 7
                out[s, c] = 0 if c == 7 else -1
                continue
            w[0] = _BETWEEN[c] * step if c < 7 else (_DENORMAL * step) * _F05
            least = np.int64(bits[0]) >> shift  # near the least weight that passes
            bits[0] = np.uint32(least << shift)
            if passes(w[0] / step, c):
                while least > 0:
                    bits[0] = np.uint32((least - 1) << shift)
                    if not passes(w[0] / step, c):
                        break
                    least -= 1
            else:
                while least < infinity:
                    least += 1
                    bits[0] = np.uint32(least << shift)
                    if passes(w[0] / step, c):
                        break
            out[s, c] = least - 1


@compiled
def codes_bf16(row: Bits, scales: Bytes, bounds: Bounds, codes: NDArray[np.uint16]) -> None:
    """Write the E2M1 code of each of a row's BF16 weights: how many bounds it is above, and its sign."""
    for b in range(scales.size):
        s = np.int64(scales[b])
        b0, b1, b2, b3 = np.int16(bounds[s, 0]), np.int16(bounds[s, 1]), np.int16(bounds[s, 2]), np.int16(bounds[s, 3])
        b4, b5, b6, b7 = np.int16(bounds[s, 4]), np.int16(bounds[s, 5]), np.int16(bounds[s, 6]), np.int16(bounds[s, 7])
        for j in range(16):
            w = row[16 * b + j]
            m = np.int16(w & np.uint16(0x7FFF))
            above = np.uint16(m > b0) + np.uint16(m > b1) + np.uint16(m > b2) + np.uint16(m > b3)
            above = above + np.uint16(m > b4) + np.uint16(m > b5) + np.uint16(m > b6)
            sign = np.uint16(w >> np.uint16(12)) & np.uint16(8) if m > b7 else np.uint16(0)
            codes[16 * b + j] = np.uint16(np.uint16(above) | sign)


@compiled
def codes_float32(row: Bits, scales: Bytes, bounds: Bounds, codes: NDArray[np.uint16]) -> None:
    """Write the E2M1 code of each of a row's float32 weights."""
    for b in range(scales.size):
        s = np.int64(scales[b])
        b0, b1, b2, b3 = bounds[s, 0], bounds[s, 1], bounds[s, 2], bounds[s, 3]
        b4, b5, b6, b7 = bounds[s, 4], bounds[s, 5], bounds[s, 6], bounds[s, 7]
        for j in range(16):
            w = row[16 * b + j]
            m = np.int32(w & np.uint32(0x7FFFFFFF))
            above = np.uint32(m > b0) + np.uint32(m > b1) + np.uint32(m > b2) + np.uint32(m > b3)
            above = above + np.uint32(m > b4) + np.uint32(m > b5) + np.uint32(m > b6)
            sign = np.uint32(w >> np.uint32(28)) & np.uint32(8) if m > b7 else np.uint32(0)
            codes[16 * b + j] = np.uint16(np.uint32(above) | sign)


@compiled
def pack_pairs(pairs: NDArray[np.uint32], out: Bytes) -> None:
    """Write two codes a byte; `pairs` are codes of 16 bits, two at a time."""
    for i in range(out.size):
        out[i] = np.uint8(pairs[i] | (pairs[i] >> np.uint32(12)))


@compiled
def pack_rows(bits: Bits, scales: Bytes, table: Floats, out: Bytes) -> None:
    """Write the packed codes e2m1(w / step), two a byte: `out` [N, K/2].

    `scales` [N, K/16] are E4M3 codes and `table` [256] their steps, f32(code) · scale_2.
    """
    rows, columns = bits.shape
    bounds, codes = np.empty((256, 8), np.int32), np.empty(columns, np.uint16)
    pairs = codes.view(np.uint32)
    bounds_of(table, 16 if bits.itemsize == 2 else 0, bounds)
    for r in range(rows):
        if bits.itemsize == 2:
            codes_bf16(bits[r], scales[r], bounds, codes)
        else:
            codes_float32(bits[r], scales[r], bounds, codes)
        pack_pairs(pairs, out[r])


@compiled
def errors(w_blocks: Floats, scales: Bytes, table: Floats, error: Floats) -> None:
    """Write |e2m1(w / step)| · step − |w| of one row; both [K/16, 16].

    The code c is concave in a = |w| / step: the least of the lines 2a, a + 2 and a/2 + 4, each rounded to an
    integer by adding 2²³. The value is convex in c: the largest of c/2, c − 2 and 2c − 8.
    """
    for b in range(scales.size):
        step, block, to = table[scales[b]], w_blocks[b], error[b]
        for j in range(16):
            magnitude = abs(block[j])
            a = magnitude / step
            c, middle, coarse = a + a + _ONE, (a + _ONE) + _F2, (a * _F05 + _ONE) + _F4
            c = c if c < middle else middle
            c = c if c < coarse else coarse
            c = (c if c < _MOST else _MOST) - _ONE
            value, middle, coarse = c * _F05, c - _F2, c + c - _F8
            value = value if value > middle else middle
            to[j] = (value if value > coarse else coarse) * step - magnitude


@compiled
def add_squares(x: Floats, sums: NDArray[np.float64]) -> None:
    """Add x² to `sums`, both [K]."""
    for i in range(x.size):
        value = np.float64(x[i])
        sums[i] += value * value


@compiled
def signal(bits: Bits) -> float:
    """Return Σ w²; always added in the same order."""
    rows, columns = bits.shape
    w, sums = np.empty(columns, np.float32), np.zeros(columns, np.float64)
    w_bits = w.view(np.uint32)
    for r in range(rows):
        widen(bits[r], w, w_bits)
        add_squares(w, sums)
    return float(sums.sum())


@compiled
def noise(bits: Bits, scales: Bytes, table: Floats) -> float:
    """Return Σ (dequantized − w)²; always added in the same order. Scales and table as of `pack_rows`."""
    rows, columns = bits.shape
    w, error, sums = np.empty(columns, np.float32), np.empty(columns, np.float32), np.zeros(columns, np.float64)
    w_bits, w_blocks, error_blocks = w.view(np.uint32), w.reshape(-1, 16), error.reshape(-1, 16)
    for r in range(rows):
        widen(bits[r], w, w_bits)
        errors(w_blocks, scales[r], table, error_blocks)
        add_squares(error, sums)
    return float(sums.sum())


@compiled
def pack_fp8(bits: Bits, scale: np.float32, out: Bytes, sums: NDArray[np.float64]) -> None:
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


# Scale search

_OFFSETS = np.array([0, -1, 1, -2, 2, 3, 4, 5, 6], dtype=np.int64)
"""In order of preference: the first of equals is taken."""
_LEAST_CODE, _MOST_CODE = 1, 126  # 2⁻⁹ and 448


@compiled
def search_scales(bits: Bits, codes: Bytes, table: Floats, unit: np.float32, block_rows: int) -> None:
    """Replace each nominal code in `codes` [N, K/16] by the best in the window.

    `table` [256] are the steps of all codes; `unit` brings errors near 1, so that their squares neither
    vanish nor overflow. Errors add up in one fixed order: the choice is the same on every machine.
    """
    rows, columns = bits.shape
    blocks = columns // 16
    w, step, error = np.empty(columns, np.float32), np.empty(columns, np.float32), np.empty(columns, np.float32)
    w_bits = w.view(np.uint32)
    tried = np.empty(blocks, np.uint8)
    total = np.empty((_OFFSETS.size, blocks), np.float64)
    for top in range(0, rows, block_rows):
        total[:] = 0.0
        for r in range(top, top + block_rows):
            widen(bits[r], w, w_bits)
            for i in range(columns):
                w[i] = abs(w[i])
            for c in range(_OFFSETS.size):
                for b in range(blocks):
                    tried[b] = np.uint8(min(max(np.int64(codes[top, b]) + _OFFSETS[c], _LEAST_CODE), _MOST_CODE))
                fill_steps(tried, table, step)
                for i in range(columns):
                    e = (rounded(w[i] / step[i]) * step[i] - w[i]) * unit
                    error[i] = e * e
                _add_blocks(error, total[c])
        for b in range(blocks):
            best = 0
            for c in range(1, _OFFSETS.size):
                if total[c, b] < total[best, b]:
                    best = c
            code = np.uint8(min(max(np.int64(codes[top, b]) + _OFFSETS[best], _LEAST_CODE), _MOST_CODE))
            for r in range(top, top + block_rows):
                codes[r, b] = code


@compiled
def _add_blocks(error: Floats, total: NDArray[np.float64]) -> None:
    """Add the sum of each 16 to `total`, as a fixed tree."""
    e = error.reshape(-1, 16)
    for b in range(total.size):
        x = e[b]
        total[b] += np.float64(
            (((x[0] + x[8]) + (x[4] + x[12])) + ((x[2] + x[10]) + (x[6] + x[14])))
            + (((x[1] + x[9]) + (x[5] + x[13])) + ((x[3] + x[11]) + (x[7] + x[15])))
        )
