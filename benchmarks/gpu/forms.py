"""Kernels of the forms that TensorRT's builder generates, for measuring what the model of time says of them.

sum       y[r, n] = Σₖ x[r, k] w[n, k], one output a program, rows as the slowest or the fastest index; BF16
chosen    y[p, n] = Σₖ x[k] W[e_p, n, k], NVFP4 codes as bytes through two tables, lanes reading x 64 bytes apart
values    y[h, d] = Σₜ p[h, t] v[t, d], lanes along t: 256 bytes apart
grouped   Y[e] = X[e] W[e]ᵀ on tensor cores, for C rows each
"""

import triton
import triton.language as tl


@triton.jit
def sum_kernel(x, w, y, N, ROWS, K: tl.constexpr, ROWS_FASTEST: tl.constexpr, BLOCK: tl.constexpr):
    """Write one output of y [ROWS, N]; x float32 [ROWS, K], w bfloat16 [N, K]."""
    pid = tl.program_id(0)
    if ROWS_FASTEST:
        n, row = pid // ROWS, pid % ROWS
    else:
        n, row = pid % N, pid // N
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        total += tl.load(x + row * K + k, mask=k < K, other=0.0) * tl.load(
            w + n.to(tl.int64) * K + k, mask=k < K, other=0.0
        ).to(tl.float32)
    tl.store(y + row * N + n, tl.sum(total, 0))


@triton.jit
def chosen_kernel(x, codes, scales, low, high, experts, y, N, K: tl.constexpr, BLOCK: tl.constexpr):
    """Write one output of y [pairs, N]; codes uint8 [E, N, K/2], scales float32 [E, N, K/16], x float32 [K]."""
    pid = tl.program_id(0)
    n, pair = pid % N, pid // N
    line = tl.load(experts + pair) * N + n
    blocks: tl.constexpr = K // 16
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, K // 2, BLOCK):
        step = start + tl.arange(0, BLOCK)
        block, byte = step % blocks, step // blocks  # neighbouring lanes: neighbouring blocks, as the builder has it
        there = step < K // 2
        code = tl.load(codes + line * (K // 2) + block * 8 + byte, mask=there, other=0).to(tl.int32)
        scale = tl.load(scales + line * blocks + block, mask=there, other=0.0)
        at = x + block * 16 + byte * 2
        product = tl.load(low + code) * tl.load(at, mask=there, other=0.0)
        product += tl.load(high + code) * tl.load(at + 1, mask=there, other=0.0)
        total += product * scale
    tl.store(y + pair * N + n, tl.sum(total, 0))


@triton.jit
def values_kernel(p, v, y, T, GROUP, D: tl.constexpr, BLOCK: tl.constexpr):
    """Write one output of y [heads, D]; p float32 [heads, T], v bfloat16 [heads / GROUP, T, D]."""
    pid = tl.program_id(0)
    head, d = pid // D, pid % D
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, T, BLOCK):
        t = start + tl.arange(0, BLOCK)
        weight = tl.load(p + head * T + t, mask=t < T, other=0.0)
        total += weight * tl.load(v + ((head // GROUP) * T + t) * D + d, mask=t < T, other=0.0).to(tl.float32)
    tl.store(y + head * D + d, tl.sum(total, 0))


@triton.jit
def grouped_kernel(x, w, y, N, K: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Write a tile [C, BN] of y [E, C, N]; x [E, C, K] and w [E, N, K] of one type."""
    expert = tl.program_id(1).to(tl.int64)
    rows, columns = tl.arange(0, C), tl.program_id(0) * BN + tl.arange(0, BN)
    total = tl.zeros([C, BN], tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        left = tl.load(x + (expert * C + rows[:, None]) * K + k[None, :], mask=k[None, :] < K, other=0.0)
        there = (columns[None, :] < N) & (k[:, None] < K)
        right = tl.load(w + (expert * N + columns[None, :]) * K + k[:, None], mask=there, other=0.0)
        total = tl.dot(left, right, total)
    at = y + (expert * C + rows[:, None]) * N + columns[None, :]
    tl.store(at, total.to(y.dtype.element_ty), mask=columns[None, :] < N)
