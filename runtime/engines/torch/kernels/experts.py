"""The routed experts: of E, each token has K, and y = sum_k weight_k down_k(relu(up_k x)^2).

    x [T, L], chosen [T, K], weights [T, K], up [E, I, L], down [E, L, I] -> y [T, L]

Bytes moved: 2 I L weights (2, 1 or 0.5625 bytes each) for every expert that is chosen at all, read once where the
tokens that chose it fit one tile; experts that nobody chose are never read. The inner activations, T K I numbers, and
the K outputs a token, T K L numbers, are written and read beside them.

The T K pairs of a token and an expert are the unit of work. The grid has all pairs, and nothing is sorted: a pair
*leads* where its rank among the pairs of its expert is a multiple of the rows of a tile; its program then works for
those pairs and the programs of others return at once. One token's pairs all lead, and go lane by lane in float32 as one
row of a linear does. So do few pairs whose activations are NVFP4 as the weights are, in whole numbers: hardly two have
one expert, and L2 has what both read. Beyond `FEW_PAIRS` pairs are sorted by expert, and programs are tiles of the
sorted pairs.
"""

from collections.abc import Callable
from functools import cache, partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activations import Activation
from ..packed import PackedWeight
from .coded import can_be_coded, coded, coded_product
from .launching import begin, ceil_div, overlapping, power_of_two, product_type
from .linear import UNIT, WORD, finished, row_blocks, stored, tile_blocks, words
from .rounding import rounded
from .rows import row_product
from .tiles import tile_product

SortedTiles = tuple[Tensor, Tensor, Tensor, Tensor]
"""The pairs sorted by expert, the expert and first pair of each tile, and where each expert's pairs end."""

FEW_PAIRS = 512
"""Up to so many pairs a program finds those of its expert by itself."""


@triton.jit
def one_token_kernel(
    x, chosen, data, scales, scale, y, N, PER_EXPERT, SCALES_PER_EXPERT,
    K: tl.constexpr, X_STRIDE: tl.constexpr, FORMAT: tl.constexpr, WIDE: tl.constexpr, SQUARED_RELU: tl.constexpr,
    BN: tl.constexpr, KU: tl.constexpr,
):  # fmt: skip
    """Write y [pairs, N] of x [K], or of [pairs, K]: program (n, pair) has BN rows of the pair's expert."""
    begin()
    pair = tl.program_id(1)
    expert = tl.load(chosen + pair)
    rows = tl.minimum(tl.program_id(0) * BN + tl.arange(0, BN), N - 1)
    product = row_product(
        x + pair * X_STRIDE, data + expert * PER_EXPERT, scales + expert * SCALES_PER_EXPERT, rows,
        K, FORMAT, WIDE, BN, KU,
    )  # fmt: skip
    product = finished(product, scale + expert, FORMAT, SQUARED_RELU)
    tl.store(y + pair * N + rows, product.to(y.dtype.element_ty))


@triton.jit
def coded_pairs_kernel(
    x, steps, x_scale, chosen, data, scales, scale, y, N, PER_EXPERT, SCALES_PER_EXPERT,
    K: tl.constexpr, PAIRS_PER_ROW: tl.constexpr, SQUARED_RELU: tl.constexpr, BN: tl.constexpr, KU: tl.constexpr,
):  # fmt: skip
    """Write y [pairs, N]; pair p reads row p // PAIRS_PER_ROW of x, in codes. Program (p, n) has BN rows of it."""
    begin()
    # Programs run in this order: those that read the same rows of an expert are near each other, and L2 has them.
    pair = tl.program_id(0)
    row = pair // PAIRS_PER_ROW
    expert = tl.load(chosen + pair)
    rows = tl.minimum(tl.program_id(1) * BN + tl.arange(0, BN), N - 1)
    product = coded_product(
        x + row * (K // 8), steps + row * (K // 16), data + expert * PER_EXPERT, scales + expert * SCALES_PER_EXPERT,
        rows, K, BN, KU,
    )  # fmt: skip
    product = finished(product * tl.load(x_scale), scale + expert, "nvfp4", SQUARED_RELU)
    tl.store(y + pair * N + rows, product.to(y.dtype.element_ty))


@triton.jit
def expert_tile(
    x, x_rows, valid, expert, data, scales, scale, y, y_rows, N, PER_EXPERT, SCALES_PER_EXPERT,
    K: tl.constexpr, FORMAT: tl.constexpr, TYPE: tl.constexpr, SQUARED_RELU: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write the columns of tile `program_id(0)` in the rows `y_rows` [BM] of y, from the rows `x_rows` [BM] of x."""
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    product = tile_product(
        x, x_rows, valid, data + expert * PER_EXPERT, scales + expert * SCALES_PER_EXPERT,
        tl.minimum(columns, N - 1), 0, tl.cdiv(K, BK), K, FORMAT, TYPE, BM, BN, BK,
    )  # fmt: skip
    product = finished(product, scale + expert, FORMAT, SQUARED_RELU)
    at = y + y_rows[:, None] * N + columns[None, :]
    tl.store(at, product.to(y.dtype.element_ty), mask=valid[:, None] & (columns < N)[None, :])


@triton.jit
def few_pairs_kernel(
    x, chosen, data, scales, scale, y, N, PER_EXPERT, SCALES_PER_EXPERT, PAIRS,
    K: tl.constexpr, PAIRS_PER_ROW: tl.constexpr, FORMAT: tl.constexpr, TYPE: tl.constexpr, SQUARED_RELU: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Write y [PAIRS, N]; pair p reads row p // PAIRS_PER_ROW of x. Program (n, p) works where p leads."""
    begin()
    pair = tl.program_id(1)
    expert = tl.load(chosen + pair)
    others = tl.arange(0, BP)
    same = (tl.load(chosen + others, mask=others < PAIRS, other=-1) == expert).to(tl.int32)
    rank = tl.sum(same * (others < pair).to(tl.int32), 0)
    if rank % BM == 0:
        ranks = tl.where(same != 0, tl.cumsum(same, 0) - 1, -1)  # [BP]
        wanted = rank + tl.arange(0, BM)
        rows = tl.sum(tl.where(ranks[None, :] == wanted[:, None], others[None, :], 0), 1)  # [BM]
        expert_tile(
            x, rows // PAIRS_PER_ROW, wanted < tl.sum(same, 0), expert, data, scales, scale, y, rows,
            N, PER_EXPERT, SCALES_PER_EXPERT, K, FORMAT, TYPE, SQUARED_RELU, BM, BN, BK,
        )  # fmt: skip


@triton.jit
def grouped_kernel(
    x, order, tile_expert, tile_first, ends, data, scales, scale, y, N, PER_EXPERT, SCALES_PER_EXPERT, EXPERTS,
    K: tl.constexpr, PAIRS_PER_ROW: tl.constexpr, FORMAT: tl.constexpr, TYPE: tl.constexpr, SQUARED_RELU: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write y [pairs, N] as `few_pairs_kernel`: program (n, tile) has BM of the pairs sorted by expert."""
    begin()
    tile = tl.program_id(1)
    expert = tl.load(tile_expert + tile).to(tl.int64)  # times the size of one
    if expert < EXPERTS:
        places = tl.load(tile_first + tile) + tl.arange(0, BM)
        valid = places < tl.load(ends + expert)
        rows = tl.load(order + places, mask=valid, other=0).to(tl.int64)  # times K or N
        expert_tile(
            x, rows // PAIRS_PER_ROW, valid, expert, data, scales, scale, y, rows,
            N, PER_EXPERT, SCALES_PER_EXPERT, K, FORMAT, TYPE, SQUARED_RELU, BM, BN, BK,
        )  # fmt: skip


@triton.jit
def combine_kernel(parts, weights, y, L, K: tl.constexpr, BLOCK: tl.constexpr):
    """Write y [T, L] = sum_k weights [T, K] parts [T, K, L], in the order of k."""
    begin()
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(K):
        part = tl.load(parts + (token * K + k) * L + at, mask=at < L, other=0.0).to(tl.float32)
        total += tl.load(weights + token * K + k) * part
    tl.store(y + token * L + at, total.to(y.dtype.element_ty), mask=at < L)


def routed_experts(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    up: PackedWeight,
    down: PackedWeight,
    activations: tuple[Activation | None, Activation | None] = (None, None),
) -> Tensor:
    """Return sum_k weights_k down_k(relu(up_k x)^2): [T, L], of x's type, which is bfloat16 or float32.

    x [T, L], chosen [T, K] int64, weights [T, K] float32; up [E, I, L] and down [E, L, I] of any formats. L and I are
    multiples of the words of the formats: 16 of NVFP4, 4 of FP8. A token's experts may repeat. What `up` and
    `down` read is rounded to `activations` first.
    """
    x, chosen, weights = x.contiguous(), chosen.contiguous(), weights.contiguous()
    (tokens, width), top_k = x.shape, chosen.shape[1]
    inner = x.new_empty(tokens * top_k, up.shape[1])
    parts = x.new_empty(tokens * top_k, width, dtype=torch.float32)
    tiles = cache(partial(sorted_tiles, chosen, up.shape[0]))  # up and down have the same
    experts_linear(x, chosen, tiles, up, inner, activations[0], squared_relu=True)
    experts_linear(inner, chosen, tiles, down, parts, activations[1], squared_relu=False)
    y = torch.empty_like(x)
    block = min(power_of_two(width), 512)
    combine_kernel[(tokens, ceil_div(width, block))](
        parts, weights, y, width, top_k, block, num_warps=4, **overlapping(x)
    )
    return y


def experts_linear(
    x: Tensor,
    chosen: Tensor,
    tiles: Callable[[int], SortedTiles],
    weight: PackedWeight,
    y: Tensor,
    activation: Activation | None,
    *,
    squared_relu: bool,
) -> None:
    """Write y [T K, N]: row p is row p // (T K / rows of x) of x [.., K] times the matrix of expert `chosen[p]`.

    `tiles` gives the sorted tiles of so many pairs.
    """
    experts, outputs, inputs = weight.shape
    pairs = chosen.numel()
    if inputs % WORD[weight.format]:
        raise ValueError(f"{inputs} inputs of {weight.format} experts are no multiple of {WORD[weight.format]}")
    if 2 * pairs <= experts and activation is not None and can_be_coded(activation, weight):
        coded_pairs(x, chosen, weight, y, activation, squared_relu)
        return
    x = rounded(activation, x)
    unit = UNIT[weight.format]
    if len(chosen) == 1 and inputs % unit == 0 and (weight.format != "bf16" or weight.data.dtype == torch.bfloat16):
        one_token(x, chosen, weight, y, squared_relu)
        return
    block_scales, scale = stored(weight)
    data = words(weight, torch.int32)
    stored_as = (data, block_scales, scale, y, outputs, *sizes(weight, data, block_scales))
    per_row, kind = pairs // x.shape[0], product_type(x)
    load = 8 if pairs <= 2 * experts else 16  # tokens of an expert that mostly share its tile
    if pairs <= FEW_PAIRS:
        block_m, block_n, block_k, options = tile_blocks(x, weight.format, load)
        few_pairs_kernel[(ceil_div(outputs, block_n), pairs)](
            x, chosen, *stored_as, pairs, inputs, per_row, weight.format, kind, squared_relu,
            block_m, block_n, block_k, max(power_of_two(pairs), 16), **options, **overlapping(x),
        )  # fmt: skip
        return
    block_m, block_n, block_k, options = tile_blocks(x, weight.format, max(pairs // experts, load))
    order, tile_expert, tile_first, ends = tiles(block_m)
    grouped_kernel[(ceil_div(outputs, block_n), len(tile_expert))](
        x, order, tile_expert, tile_first, ends, *stored_as, experts, inputs, per_row, weight.format, kind,
        squared_relu, block_m, block_n, block_k, **options, **overlapping(x),
    )  # fmt: skip


def coded_pairs(
    x: Tensor, chosen: Tensor, weight: PackedWeight, y: Tensor, activation: Activation, squared_relu: bool
) -> None:
    """Write y by `coded_pairs_kernel`: of so few pairs nearly each has an expert of its own."""
    _, outputs, inputs = weight.shape
    pairs = chosen.numel()
    codes, steps, x_scale = coded(activation, x)
    block, warps = row_blocks(outputs * pairs, inputs, UNIT["nvfp4"])
    data = words(weight, torch.int64)
    block_scales, scale = stored(weight, torch.int16)
    coded_pairs_kernel[(pairs, ceil_div(outputs, block))](
        codes.view(torch.int64), steps, x_scale, chosen, data, block_scales, scale, y, outputs,
        *sizes(weight, data, block_scales), inputs, pairs // len(x), squared_relu, block, 32 * warps,
        num_warps=warps, **overlapping(x),
    )  # fmt: skip


def one_token(x: Tensor, chosen: Tensor, weight: PackedWeight, y: Tensor, squared_relu: bool) -> None:
    """Write y by `one_token_kernel`."""
    _, outputs, inputs = weight.shape
    pairs, unit = chosen.numel(), UNIT[weight.format]
    block, warps = row_blocks(outputs * pairs, inputs, unit)
    data, wide = words(weight, torch.int64), x.dtype == torch.float32
    block_scales, scale = stored(weight, torch.int16)
    stride = 0 if len(x) == 1 else inputs // (2 if wide else 4)
    one_token_kernel[(ceil_div(outputs, block), pairs)](
        x.view(torch.int64), chosen, data, block_scales, scale, y, outputs, *sizes(weight, data, block_scales),
        inputs, stride, weight.format, wide, squared_relu, block, 32 * warps, num_warps=warps, **overlapping(x),
    )  # fmt: skip


def sizes(weight: PackedWeight, data: Tensor, block_scales: Tensor) -> tuple[int, int]:
    """Return how many elements of `data` and of the block scales an expert has."""
    return data.numel() // weight.shape[0], block_scales.numel() // weight.shape[0]


def sorted_tiles(chosen: Tensor, experts: int, block: int) -> SortedTiles:
    """Return the pairs sorted by expert, the expert and first pair of each tile, and where each expert's pairs end.

    Tiles are as many as any choice may need; the expert of those without work is `experts`.
    """
    pairs = chosen.numel()
    by_expert, order = chosen.flatten().sort(stable=True)
    bounds = torch.searchsorted(by_expert, torch.arange(experts + 1, device=chosen.device))
    first, ends = bounds[:-1], bounds[1:]
    tiles = (ends - first + block - 1) // block
    tiles_end = tiles.cumsum(0)
    tile = torch.arange(pairs // block + min(experts, pairs), device=chosen.device)
    tile_expert = torch.searchsorted(tiles_end, tile, right=True)
    inside = tile_expert.clamp(max=experts - 1)
    tile_first = first[inside] + (tile - (tiles_end - tiles)[inside]) * block
    return order.int(), tile_expert.int(), tile_first.int(), ends.int()
