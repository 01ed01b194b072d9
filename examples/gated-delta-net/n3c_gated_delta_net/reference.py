"""The ops in plain PyTorch, as their definitions have them: the recurrence is a loop over tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6
"""Added to the squared length of a query or key."""


def split_groups(x: Tensor, *, groups: int, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    grouped = x.unflatten(-1, (groups, sum(sizes)))
    return tuple(piece.flatten(-2) for piece in grouped.split(list(sizes), dim=-1))


def norm_then_gate(x: Tensor, gate: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    heads: Tensor = x.unflatten(-1, (-1, weight.shape[0]))
    normed = heads * torch.rsqrt(heads.square().mean(-1, keepdim=True) + eps) * weight.float()
    return normed.flatten(-2) * F.silu(gate)


def gated_delta(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, A: Tensor, dt_bias: Tensor, *, num_key_heads: int
) -> Tensor:
    heads = A.shape[0]
    state = v.new_zeros(v.shape[0], heads, k.shape[-1] // num_key_heads, v.shape[-1] // heads)
    return gated_delta_update(q, k, v, a, b, A, dt_bias, state, num_key_heads=num_key_heads)[0]


def gated_delta_update(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    A: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    counts: Tensor | None = None,
    *,
    num_key_heads: int,
) -> tuple[Tensor, Tensor]:
    heads = A.shape[0]
    query, key = (_unit(t.unflatten(-1, (num_key_heads, -1))) for t in (q, k))  # [B, S, Hk, Dk]
    query, key = (t.repeat_interleave(heads // num_key_heads, dim=2) for t in (query, key))
    query = query * query.shape[-1] ** -0.5
    value = v.unflatten(-1, (heads, -1))
    decay, strength = (A * F.softplus(a + dt_bias)).exp(), b.sigmoid()  # [B, S, Hv]
    if counts is not None:
        counted = (torch.arange(v.shape[1]) < counts[:, None])[..., None]
        decay, strength = torch.where(counted, decay, 1.0), strength * counted
    memory, outputs = state.float(), list[Tensor]()
    for s in range(v.shape[1]):
        memory = memory * decay[:, s, :, None, None]
        recalled = torch.einsum("bhkv,bhk->bhv", memory, key[:, s])
        correction = strength[:, s, :, None] * (value[:, s] - recalled)
        memory = memory + key[:, s, :, :, None] * correction[:, :, None, :]
        outputs.append(torch.einsum("bhkv,bhk->bhv", memory, query[:, s]))
    return torch.stack(outputs, dim=1).flatten(-2), memory.to(state.dtype)


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + EPS)
