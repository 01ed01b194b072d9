"""Mamba-2 for a few tokens that follow a state: convolution, discretization and recurrence in one pass over it.

    x, B, C = silu(conv(xBC))                          conv over W taps, each channel by itself
    dt = softplus(dt + dt_bias),   A = -exp(A_log)
    h = exp(dt A) h + dt x B^T                         h [P, N] of each head
    y = h C + D x

Bytes moved: the state, B H P N numbers, read and (if it advances) written once for all T tokens, which is nearly all;
T (inner + X + H) numbers of the projection and the window's (W - 1) X beside it. All arithmetic is float32; what
leaves the convolution is rounded to the projection's type, as the generated package does.

A program has BP channels of one head. It computes the convolution of those and of its group's B and C, a few
thousand operations done again by each program of a group instead of a launch and a round trip. As all of them read
the window, another kernel moves it on behind this one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import SMS, ceil_div, power_of_two


@triton.jit
def log1p_of_at_most_1(x):
    """Return log(1 + x) of 0 ≤ x ≤ 1 to float32's precision: 2 artanh(x / (2 + x)), whose argument is at most 1/3."""
    s = x / (2.0 + x)
    q = s * s
    series = 1.0 / 15
    series = series * q + 1.0 / 13
    series = series * q + 1.0 / 11
    series = series * q + 1.0 / 9
    series = series * q + 1.0 / 7
    series = series * q + 1.0 / 5
    series = series * q + 1.0 / 3
    return 2.0 * s * (series * q + 1.0)


@triton.jit
def softplus(x):
    """Return log(1 + exp(x)), exactly where it is small too."""
    return tl.maximum(x, 0.0) + log1p_of_at_most_1(tl.exp(-tl.abs(x)))


@triton.jit
def convolved(
    projected, window, weight, bias, channels, valid, OFFSET, WIDTH, X,
    TOKEN: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Return silu(conv) of `channels` at one token, float32: taps before the first token are read from the window."""
    total = tl.load(bias + channels, mask=valid, other=0.0).to(tl.float32)
    for tap in tl.static_range(W):
        before: tl.constexpr = TOKEN + tap - (W - 1)
        if before < 0:
            value = tl.load(window + (before + W - 1) * X + channels, mask=valid, other=0.0)
        else:
            value = tl.load(projected + before * WIDTH + OFFSET + channels, mask=valid, other=0.0)
        total += value.to(tl.float32) * tl.load(weight + channels * W + tap, mask=valid, other=0.0).to(tl.float32)
    total = total / (1.0 + tl.exp(-total))
    return total.to(projected.dtype.element_ty).to(tl.float32)


@triton.jit
def step_kernel(
    projected, window, ssm, conv_weight, conv_bias, A_log, D, dt_bias, counts, y,
    H, P, N, X, GROUPS, HEADS_PER_GROUP,
    T: tl.constexpr, W: tl.constexpr, COUNTED: tl.constexpr, ADVANCE: tl.constexpr,
    BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Write y [B, T, H P] of BP channels of a head, and its part of the state: program (channels, head, sequence)."""
    head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    inner = H * P
    width = inner + X + H
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    n = tl.arange(0, BN)
    p_valid, n_valid = p < P, n < N
    state_at = ssm + (row * H + head) * P * N + p[:, None] * N + n[None, :]
    valid = p_valid[:, None] & n_valid[None, :]
    state = tl.load(state_at, mask=valid, other=0.0).to(tl.float32)
    projected += row * T * width
    window += row * (W - 1) * X
    u_channels = head * P + p
    b_channels = inner + (head // HEADS_PER_GROUP) * N + n
    c_channels = b_channels + GROUPS * N
    A = -tl.exp(tl.load(A_log + head).to(tl.float32))
    skip = tl.load(D + head).to(tl.float32)
    bias = tl.load(dt_bias + head).to(tl.float32)
    for t in tl.static_range(T):
        u = convolved(projected, window, conv_weight, conv_bias, u_channels, p_valid, inner, width, X, t, W)
        b = convolved(projected, window, conv_weight, conv_bias, b_channels, n_valid, inner, width, X, t, W)
        c = convolved(projected, window, conv_weight, conv_bias, c_channels, n_valid, inner, width, X, t, W)
        dt = softplus(tl.load(projected + t * width + inner + X + head).to(tl.float32) + bias)
        if COUNTED:
            dt = tl.where(t < tl.load(counts + row), dt, 0.0)  # a padding token neither decays nor adds
        state = state * tl.exp(dt * A) + (u * dt)[:, None] * b[None, :]
        out = tl.sum(state * c[None, :], 1) + skip * u
        tl.store(y + (row * T + t) * inner + u_channels, out, mask=p_valid)
    if ADVANCE:
        tl.store(state_at, state.to(ssm.dtype.element_ty), mask=valid)


@triton.jit
def window_kernel(
    projected, window, counts, OFFSET, WIDTH, X, T: tl.constexpr, W: tl.constexpr, COUNTED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Move the window [W - 1, X] of a sequence on by its tokens: program (channels, sequence)."""
    row = tl.program_id(1).to(tl.int64)
    channels = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = channels < X
    count = tl.load(counts + row).to(tl.int32) if COUNTED else T
    projected += row * T * WIDTH + OFFSET
    window += row * (W - 1) * X
    # Ascending, row i takes row i + count: a row is read before it is written.
    for i in tl.static_range(W - 1):
        source = i + count
        old = tl.load(window + source * X + channels, mask=valid & (source < W - 1), other=0.0)
        new = tl.load(projected + (source - (W - 1)) * WIDTH + channels, mask=valid & (source >= W - 1), other=0.0)
        value = tl.where(source < W - 1, old.to(tl.float32), new.to(tl.float32))
        tl.store(window + i * X + channels, value.to(window.dtype.element_ty), mask=valid)


def mamba2_step(
    projected: Tensor,
    window: Tensor,
    ssm: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    *,
    groups: int,
    counts: Tensor | None = None,
    advance: bool = True,
) -> Tensor:
    """Return y [B, T, inner] float32 of the T tokens that follow the state; made for T from 1 to 8.

    projected [B, T, inner + X + H] is z, xBC and dt side by side; window [B, W - 1, X]; ssm [B, H, P, N] of any float
    type; conv_weight [X, W]; conv_bias [X]; A_log, D, dt_bias [H]. Unless `advance` is false, window and ssm are moved
    on in place, by the first `counts` [B] tokens where it is given: y of the tokens after them means nothing.
    """
    assert window.is_contiguous() and ssm.is_contiguous()
    projected, conv_weight = projected.contiguous(), conv_weight.contiguous()
    batch, tokens, width = projected.shape
    _, heads, channels, size = ssm.shape
    conv_size, taps = conv_weight.shape
    inner = heads * channels
    y = torch.empty(batch, tokens, inner, dtype=torch.float32, device=projected.device)
    # Parts of a head, so that one sequence gives each SM several programs; 16 KB of state in flight for each.
    block_n = power_of_two(size)
    block_p = min(power_of_two(channels), max(4096 // block_n, 1))
    while block_p > 4 and batch * heads * ceil_div(channels, block_p) < 2 * SMS:
        block_p //= 2
    counted = projected if counts is None else counts
    step_kernel[(ceil_div(channels, block_p), heads, batch)](
        projected, window, ssm, conv_weight, conv_bias, A_log, D, dt_bias, counted, y,
        heads, channels, size, conv_size, groups, heads // groups,
        tokens, taps, counts is not None, advance, block_p, block_n, num_warps=4,
    )  # fmt: skip
    if advance:
        block = min(power_of_two(conv_size), 256)
        window_kernel[(ceil_div(conv_size, block), batch)](
            projected, window, counted, inner, width, conv_size, tokens, taps, counts is not None, block, num_warps=2
        )  # fmt: skip
    return y
