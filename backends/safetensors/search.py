"""Better block scales than the nearest: the E4M3 neighbour with the least squared error.

For each block the codes from two below to six above the nominal one are tried. The tensor's scale
leaves room for them: amax / (6 · 256), so that the nominal code of the largest block is 256 and six
above is 448, E4M3's largest. The window finds what a sweep over all 126 codes finds, at a fourteenth
of its cost (docs/quantization.md has the figures). Sweeps are ModelOpt's `mse` calibration; choosing
between two scales is the paper Four Over Six (arXiv 2512.02010).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .kernel import Bits, Bytes, Floats, compiled, fill_steps, rounded, widen

SEARCH_MAX = 256.0
"""The nominal scale of the largest block: 448 without search."""

_OFFSETS = np.array([0, -1, 1, -2, 2, 3, 4, 5, 6], dtype=np.int64)
"""In order of preference: the first of equals is taken."""
_LEAST, _MOST = 1, 126  # 2⁻⁹ and 448


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
                    tried[b] = np.uint8(min(max(np.int64(codes[top, b]) + _OFFSETS[c], _LEAST), _MOST))
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
            code = np.uint8(min(max(np.int64(codes[top, b]) + _OFFSETS[best], _LEAST), _MOST))
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
