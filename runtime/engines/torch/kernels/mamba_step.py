"""Mamba-2 for a few tokens that follow a state: convolution, discretization and recurrence in one pass over it.

    x, B, C = silu(conv(xBC))                          conv over W taps, each channel by itself
    dt = softplus(dt + dt_bias),   A = -exp(A_log)
    h = exp(dt A) h + dt x B^T                         h [P, N] of each head
    y = h C + D x

Bytes moved: the state, B H P N numbers, read and (if it advances) written once for all T tokens, which is nearly all;
T (inner + 2 X + H) numbers of the projection and the convolution and the window's (W - 1) X beside it. All arithmetic
is float32; what leaves the convolution is rounded to the projection's type, as the generated package does.

Two kernels: `conv_kernel` has each channel in one program, so it can move the window on in place, and `step_kernel`
has BP channels of one head, of which there are enough to fill the card.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import SMS, begin, ceil_div, overlapping, power_of_two


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
def token_or_window(projected, window, channels, valid, WIDTH, X, PLACE: tl.constexpr, W: tl.constexpr):
    """Return row PLACE of the window and the tokens after it, at `channels`, in float32."""
    if PLACE < W - 1:
        value = tl.load(window + PLACE * X + channels, mask=valid, other=0.0)
    else:
        value = tl.load(projected + (PLACE - (W - 1)) * WIDTH + channels, mask=valid, other=0.0)
    return value.to(tl.float32)


@triton.jit
def conv_kernel(
    projected, window, weight, bias, counts, out, OFFSET, WIDTH, X,
    T: tl.constexpr, W: tl.constexpr, COUNTED: tl.constexpr, ADVANCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write silu(conv) [B, T, X] and move the window on: program (channels, sequence)."""
    begin()
    row = tl.program_id(1).to(tl.int64)
    channels = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = channels < X
    projected += row * T * WIDTH + OFFSET
    window += row * (W - 1) * X
    first = tl.load(bias + channels, mask=valid, other=0.0).to(tl.float32)
    for t in tl.static_range(T):
        total = first
        for tap in tl.static_range(W):
            factor = tl.load(weight + channels * W + tap, mask=valid, other=0.0).to(tl.float32)
            total += token_or_window(projected, window, channels, valid, WIDTH, X, t + tap, W) * factor
        total = total / (1.0 + tl.exp(-total))
        tl.store(out + (row * T + t) * X + channels, total.to(out.dtype.element_ty), mask=valid)
    if ADVANCE:
        count = tl.load(counts + row).to(tl.int32) if COUNTED else T
        # Row i takes row i + count, in ascending order, so that a row is read before it is written.
        for i in tl.static_range(W - 1):
            source = i + count
            old = tl.load(window + source * X + channels, mask=valid & (source < W - 1), other=0.0)
            new = projected + (source - (W - 1)) * WIDTH + channels
            new = tl.load(new, mask=valid & (source >= W - 1), other=0.0)
            value = tl.where(source < W - 1, old.to(tl.float32), new.to(tl.float32))
            tl.debug_barrier()  # loads and stores may lay channels out among threads differently
            tl.store(window + i * X + channels, value.to(window.dtype.element_ty), mask=valid)


@triton.jit
def step_kernel(
    projected, convolved, ssm, A_log, D, dt_bias, counts, y, H, P, N, X, GROUPS, HEADS_PER_GROUP,
    T: tl.constexpr, COUNTED: tl.constexpr, ADVANCE: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Write y [B, T, H P] of BP channels of a head, and its part of the state: program (channels, head, sequence)."""
    begin()
    head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    inner = H * P
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    n = tl.arange(0, BN)
    p_valid, n_valid = p < P, n < N
    state_at = ssm + (row * H + head) * P * N + p[:, None] * N + n[None, :]
    valid = p_valid[:, None] & n_valid[None, :]
    state = tl.load(state_at, mask=valid, other=0.0).to(tl.float32)
    convolved += row * T * X
    steps = projected + row * T * (inner + X + H) + inner + X + head
    u_at = head * P + p
    b_at = inner + (head // HEADS_PER_GROUP) * N + n
    c_at = b_at + GROUPS * N
    A = -tl.exp(tl.load(A_log + head).to(tl.float32))
    skip = tl.load(D + head).to(tl.float32)
    bias = tl.load(dt_bias + head).to(tl.float32)
    for t in tl.static_range(T):
        u = tl.load(convolved + t * X + u_at, mask=p_valid, other=0.0).to(tl.float32)
        b = tl.load(convolved + t * X + b_at, mask=n_valid, other=0.0).to(tl.float32)
        c = tl.load(convolved + t * X + c_at, mask=n_valid, other=0.0).to(tl.float32)
        dt = softplus(tl.load(steps + t * (inner + X + H)).to(tl.float32) + bias)
        if COUNTED:
            dt = tl.where(t < tl.load(counts + row), dt, 0.0)  # a padding token neither decays nor adds
        state = state * tl.exp(dt * A) + (u * dt)[:, None] * b[None, :]
        out = tl.sum(state * c[None, :], 1) + skip * u
        tl.store(y + (row * T + t) * inner + u_at, out, mask=p_valid)
    if ADVANCE:
        tl.store(state_at, state.to(ssm.dtype.element_ty), mask=valid)


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
    convolved = projected.new_empty(batch, tokens, conv_size)
    block = min(power_of_two(conv_size), 128)
    conv_kernel[(ceil_div(conv_size, block), batch)](
        projected, window, conv_weight, conv_bias, counted, convolved, inner, width, conv_size,
        tokens, taps, counts is not None, advance, block, num_warps=2, **overlapping(projected),
    )  # fmt: skip
    step_kernel[(ceil_div(channels, block_p), heads, batch)](
        projected, convolved, ssm, A_log, D, dt_bias, counted, y, heads, channels, size, conv_size, groups,
        heads // groups, tokens, counts is not None, advance, block_p, block_n, num_warps=4, **overlapping(projected),
    )  # fmt: skip
    return y
