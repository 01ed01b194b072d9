"""y = x W^T with weights as they are stored: BF16, FP8 or NVFP4, dequantized in registers.

    x [T, K], W [N, K] -> y [T, N]

Bytes moved: those of the weight (2, 1 or 0.5625 times N K), read once whatever T is up to 16; x and y are
T (K + N) numbers.

One row: `row_kernel`, lane by lane in float32, or `coded_row_kernel`, in whole numbers, where activations are NVFP4 as
the weight is. A program takes BN rows of the matrix and all of K; its warps lie along K, and each thread has BN loads
of 16 bytes in flight. Two to 16 rows: `tile_kernel`, on the tensor cores, where the 16 rows of a tile cost no more than
one; K is split among programs where N is small, and `sum_kernel` adds the parts in a fixed order. More rows: the same
kernel with more rows a tile, up to where arithmetic is the bound; then a quantized matrix is written out in x's type
once (3 or 2.6 bytes a weight) for cuBLAS, which BF16 matrices always use.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..activations import Activation
from ..few_rows import FEW_ROWS
from ..packed import Format, PackedWeight
from .coded import can_be_coded, coded, coded_product
from .launching import (
    SMS,
    begin,
    ceil_div,
    has_wide_products,
    let_next_start,
    overlapping,
    power_of_two,
    product_type,
    wait_for_previous,
)
from .rounding import rounded
from .rows import row_product
from .tiles import prefetch_tile, tile_product, weight_tile

UNIT = {"bf16": 8, "fp8": 16, "nvfp4": 32}
"""Weights in 16 bytes: what K must be a multiple of for `row_kernel`."""
WORD = {"bf16": 1, "fp8": 4, "nvfp4": 16}
"""Weights that K must be a multiple of for `tile_kernel`."""
DEQUANTIZE_ROWS = 256
"""From so many rows on a quantized matrix is dequantized for cuBLAS: tiles would do it again for each 128 rows."""


@triton.jit
def finished(y, scale, FORMAT: tl.constexpr, SQUARED_RELU: tl.constexpr):
    """Return y times the matrix' scale and, where asked, the square of its positive part."""
    if FORMAT != "bf16":
        y *= tl.load(scale)
    if SQUARED_RELU:
        y = tl.maximum(y, 0.0)
        y *= y
    return y


@triton.jit
def row_kernel(
    x, data, scales, scale, y, N,
    K: tl.constexpr, FORMAT: tl.constexpr, WIDE: tl.constexpr, SQUARED_RELU: tl.constexpr,
    BN: tl.constexpr, KU: tl.constexpr,
):  # fmt: skip
    """Write y [N] of x [K]: program n has the rows n BN … of the matrix."""
    let_next_start()
    # The last program repeats its last row instead of masking: equal values are written twice.
    rows = tl.minimum(tl.program_id(0) * BN + tl.arange(0, BN), N - 1)
    product = row_product(x, data, scales, rows, K, FORMAT, WIDE, BN, KU)
    tl.store(y + rows, finished(product, scale, FORMAT, SQUARED_RELU).to(y.dtype.element_ty))


@triton.jit
def coded_row_kernel(
    x, steps, x_scale, data, scales, scale, y, N,
    K: tl.constexpr, SQUARED_RELU: tl.constexpr, BN: tl.constexpr, KU: tl.constexpr,
):  # fmt: skip
    """Write y [N] of x [K] in codes: program n has the rows n BN … of the matrix."""
    let_next_start()
    rows = tl.minimum(tl.program_id(0) * BN + tl.arange(0, BN), N - 1)
    product = coded_product(x, steps, data, scales, rows, K, BN, KU) * tl.load(x_scale)
    tl.store(y + rows, finished(product, scale, "nvfp4", SQUARED_RELU).to(y.dtype.element_ty))


@triton.jit
def tile_kernel(
    x, data, scales, scale, y, T, N, TILES,
    K: tl.constexpr, FORMAT: tl.constexpr, TYPE: tl.constexpr, SQUARED_RELU: tl.constexpr, PARTS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write y [T, N], or y [PARTS, T, N] before the scale: program (n, m, part) has a tile of it."""
    let_next_start()
    part = tl.program_id(2)
    x_rows = tl.program_id(1) * BM + tl.arange(0, BM)
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.minimum(columns, N - 1)
    first = part * TILES
    last = tl.minimum(first + TILES, tl.cdiv(K, BK))
    if BM < 64:
        for tile in tl.static_range(2):
            prefetch_tile(data, rows, (first + tile) * BK, K, FORMAT, BN, BK)
    wait_for_previous()
    product = tile_product(x, x_rows, x_rows < T, data, scales, rows, first, last, K, FORMAT, TYPE, BM, BN, BK)
    if PARTS == 1:
        product = finished(product, scale, FORMAT, SQUARED_RELU)
    at = y + part * T * N + x_rows[:, None] * N + columns[None, :]
    tl.store(at, product.to(y.dtype.element_ty), mask=(x_rows < T)[:, None] & (columns < N)[None, :])


@triton.jit
def sum_kernel(
    parts, scale, y, SIZE,
    FORMAT: tl.constexpr, SQUARED_RELU: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the sum [SIZE] of `parts` [PARTS, SIZE], finished."""
    begin()
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts + part * SIZE + at, mask=at < SIZE, other=0.0)
    total = finished(total, scale, FORMAT, SQUARED_RELU)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=at < SIZE)


@triton.jit
def dequantize_kernel(
    data, scales, scale, out, N, K: tl.constexpr, FORMAT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    """Write a tile [BN, BK] of a matrix as numbers."""
    begin()
    columns = tl.program_id(0) * BK + tl.arange(0, BK)
    rows = tl.program_id(1) * BN + tl.arange(0, BN)
    tile = weight_tile(
        data, scales, tl.minimum(rows, N - 1), tl.program_id(0) * BK, K, FORMAT, tl.float32, BN, BK, False
    ).to(tl.float32)
    tile *= 2.0**16 if FORMAT == "nvfp4" else 2.0**120
    tile *= tl.load(scale)
    at = out + rows[:, None].to(tl.int64) * K + columns[None, :]
    tl.store(at, tile.to(out.dtype.element_ty), mask=(rows < N)[:, None] & (columns < K)[None, :])


def words(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Return the data of a weight as words of `dtype`; numbers of a BF16 weight as they are, if that is int32."""
    if weight.format == "bf16" and dtype == torch.int32:
        return weight.data
    return weight.data.view(dtype)


def stored(weight: PackedWeight, dtype: torch.dtype = torch.uint8) -> tuple[Tensor, Tensor]:
    """Return the block scales, as `dtype`, and the scale of a weight; its data where it has none, and none is read."""
    block_scales, scale = weight.block_scales, weight.scale
    block_scales = block_scales if block_scales is None else block_scales.view(dtype)
    return weight.data if block_scales is None else block_scales, weight.data if scale is None else scale


IN_FLIGHT = 20 << 10
"""Bytes that the loads of an SM ask for at once: 3 TB/s times some 800 ns of latency are 18 KB."""


def row_blocks(rows: int, inputs: int, unit: int) -> tuple[int, int]:
    """Return BN, the rows of a matrix a program takes, and its warps, of 32 units of K each.

    A warp asks for 512 bytes of each of its rows, and for the next 512 before it computes. Of the numbers of warps for
    which that is enough in flight, those count whose last part of K is least empty: NVFP4 is near the bound of
    arithmetic. Of these the fewest whose loads are plenty: each then streams for longer. Activations are unpacked
    once for BN rows; seven warps an SM at least, in three programs, have their arithmetic overlap.
    """

    def rounds(warps: int) -> int:
        return ceil_div(inputs, warps * 32 * unit)

    asked = {warps: rows * warps * 512 * min(rounds(warps), 2) for warps in (1, 2, 4)}
    enough = [warps for warps, size in asked.items() if size >= SMS * IN_FLIGHT] or [4]
    least = min(rounds(warps) * warps for warps in enough)
    tight = [warps for warps in enough if rounds(warps) * warps * 7 <= least * 8]
    warps = next((warps for warps in tight if asked[warps] >= 2 * SMS * IN_FLIGHT), tight[-1])
    block = 8
    while block > 1 and (ceil_div(rows, block) < 3 * SMS or ceil_div(rows, block) * warps < 7 * SMS):
        block //= 2
    return block, warps


def few_rows_linear(
    x: Tensor,
    weight: PackedWeight,
    *,
    activation: Activation | None = None,
    squared_relu: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return x [T, K] times a matrix [N, K]: [T, N] in `dtype`, x's own if it is left out; made for T ≤ 16.

    With `squared_relu`, max(x W^T, 0)². x is bfloat16 or float32 (whose products are float32 too), and is rounded to
    `activation` first.
    """
    outputs, inputs = weight.shape
    count = x.shape[0]
    if count == 1 and activation is not None and can_be_coded(activation, weight):
        return coded_row(x, weight, activation, squared_relu, dtype or x.dtype)
    x = rounded(activation, x)
    if inputs % WORD[weight.format]:  # words would lie across rows
        return dense_linear(x, weight, squared_relu, dtype)
    x = x.contiguous()
    y = x.new_empty(count, outputs, dtype=dtype or x.dtype)
    unit = UNIT[weight.format]
    exact = weight.format != "bf16" or weight.data.dtype == torch.bfloat16
    if count == 1 and inputs % unit == 0 and exact and x.dtype in (torch.bfloat16, torch.float32):
        block, warps = row_blocks(outputs, inputs, unit)
        row_kernel[(ceil_div(outputs, block),)](
            x.view(torch.int64), words(weight, torch.int64), *stored(weight, torch.int16), y, outputs,
            inputs, weight.format, x.dtype == torch.float32, squared_relu, block, 32 * warps, num_warps=warps,
            **overlapping(x),
        )  # fmt: skip
        return y
    tile_linear(x, weight, y, squared_relu)
    return y


def coded_row(
    x: Tensor, weight: PackedWeight, activation: Activation, squared_relu: bool, dtype: torch.dtype
) -> Tensor:
    """Return y [1, N] of x [1, K]."""
    outputs, inputs = weight.shape
    y = x.new_empty(1, outputs, dtype=dtype)
    codes, steps, x_scale = coded(activation, x)
    block, warps = row_blocks(outputs, inputs, UNIT["nvfp4"])
    block = max(block // 2, 1)  # fewer instructions a row: more programs are quicker, by 0 to 17 % on an H100
    coded_row_kernel[(ceil_div(outputs, block),)](
        codes.view(torch.int64), steps, x_scale, words(weight, torch.int64), *stored(weight, torch.int16), y, outputs,
        inputs, squared_relu, block, 32 * warps, num_warps=warps, **overlapping(x),
    )  # fmt: skip
    return y


def tile_blocks(x: Tensor, stored_as: Format, rows: int, *, long: bool = False) -> tuple[int, int, int, dict[str, int]]:
    """Return BM, BN, BK and the launch options of a product of tiles for `rows` rows of x [.., K].

    For few rows a tile of weights is 64 rows of 128 or 256 bytes, three or four of them on their way to shared memory
    for each of some five programs of an SM: over 100 KB. Eight rows are the fewest that an instruction takes. Long
    tiles are 512 columns of `nvfp4`, for GPUs whose SMs hold two such programs.
    """
    least = max(power_of_two(x.shape[-1]), 16)
    if long and rows <= FEW_ROWS and stored_as == "nvfp4" and has_wide_products(x):
        return max(power_of_two(rows), 8), 64, min(512, least), {"num_warps": 4, "num_stages": 3}
    if rows <= 32:
        block_k = 256 if stored_as == "nvfp4" else 128
        options = {"num_warps": 4, "num_stages": 3 if stored_as == "bf16" else 4}
        return max(power_of_two(rows), 8), 64, min(block_k, least), options
    block_m = min(power_of_two(rows), 128)
    # With 128 columns a thread's part of the block scales is four bytes, the least that is copied without waiting.
    block_k = 128 if stored_as == "nvfp4" and has_wide_products(x) else 64
    return block_m, 128, min(block_k, least), {"num_warps": 4 if block_m == 64 else 8, "num_stages": 3}


def tile_linear(x: Tensor, weight: PackedWeight, y: Tensor, squared_relu: bool) -> None:
    """Write y by `tile_kernel`; K is split where N alone gives an SM fewer than four programs, two of long tiles."""
    (count, inputs), outputs = x.shape, weight.shape[0]
    block_m, block_n, block_k, options = tile_blocks(x, weight.format, count, long=True)
    programs = (2 if block_k == 512 else 4) * SMS
    grid_n, grid_m, columns = ceil_div(outputs, block_n), ceil_div(count, block_m), ceil_div(inputs, block_k)
    # Sums of parts are 4 bytes, written and read: at most an eighth of the bytes of the weight.
    parts = min(ceil_div(programs, grid_n * grid_m), weight.bytes // (64 * outputs * count), columns)
    tiles = ceil_div(columns, max(parts, 1))
    parts = ceil_div(columns, tiles)
    out = y if parts == 1 else y.new_empty(parts, count, outputs, dtype=torch.float32)
    block_scales, scale = stored(weight)
    tile_kernel[(grid_n, grid_m, parts)](
        x, words(weight, torch.int32), block_scales, scale, out, count, outputs, tiles,
        inputs, weight.format, product_type(x), squared_relu, parts, block_m, block_n, block_k, **options,
        **overlapping(x),
    )  # fmt: skip
    if parts > 1:
        size = count * outputs
        sum_kernel[(ceil_div(size, 512),)](
            out, scale, y, size, weight.format, squared_relu, parts, 512, num_warps=4, **overlapping(x)
        )  # fmt: skip


def many_rows_linear(
    x: Tensor,
    weight: PackedWeight,
    *,
    activation: Activation | None = None,
    squared_relu: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return what `few_rows_linear` returns, for any number of rows."""
    count = x.shape[0]
    quantized = weight.format != "bf16"
    if count <= FEW_ROWS or (quantized and count < DEQUANTIZE_ROWS):
        return few_rows_linear(x, weight, activation=activation, squared_relu=squared_relu, dtype=dtype)
    return dense_linear(rounded(activation, x), weight, squared_relu, dtype)


def dense_linear(x: Tensor, weight: PackedWeight, squared_relu: bool, dtype: torch.dtype | None) -> Tensor:
    """Return x W^T by PyTorch's product with the whole matrix in x's type."""
    y = F.linear(x, dequantized(weight, x.dtype)).to(dtype or x.dtype)
    return F.relu(y).square() if squared_relu else y


def dequantized(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Return a matrix [N, K] in `dtype`, in one pass over it."""
    outputs, inputs = weight.shape
    if weight.format == "bf16" or inputs % WORD[weight.format]:
        return weight.dequantized(dtype)
    out = torch.empty(outputs, inputs, dtype=dtype, device=weight.data.device)
    block_n, block_k = 16, min(512, max(power_of_two(inputs), 16))
    block_scales, scale = stored(weight)
    dequantize_kernel[(ceil_div(inputs, block_k), ceil_div(outputs, block_n))](
        words(weight, torch.int32),
        block_scales,
        scale,
        out,
        outputs,
        inputs,
        weight.format,
        block_n,
        block_k,
        **overlapping(out),
    )
    return out
