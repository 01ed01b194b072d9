"""Every op in plain PyTorch: the reference of each rewrite and of each backend.

Written for reading, not for speed: recurrences are loops over tokens. All arithmetic is float32;
states are rounded to their stored type where they are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from n3c.ir.ops import CACHE_MAX

from .activations import ACTIVATIONS

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def _unflatten(x: Tensor, *sizes: int) -> Tensor:
    return x.reshape(*x.shape[:-1], *sizes)


def embedding(ids: Tensor, table: Tensor) -> Tensor:
    return table[ids].float()


def shift_left(ids: Tensor) -> Tensor:
    return F.pad(ids[:, 1:], (0, 1))


def last_token(x: Tensor, counts: Tensor) -> Tensor:
    return x[torch.arange(x.shape[0]), (counts - 1).clamp(min=0)].unsqueeze(1)


def add(x: Tensor, y: Tensor) -> Tensor:
    return x + y


def relu2(x: Tensor) -> Tensor:
    return x.relu().square()


def concat(x: Tensor, y: Tensor) -> Tensor:
    return torch.cat((x, y), dim=-1)


def split(x: Tensor, *, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.split(x, list(sizes), dim=-1))


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, *, groups: int, eps: float) -> Tensor:
    grouped = _unflatten(x * F.silu(gate), groups, -1)
    return (grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + eps)).flatten(-2) * weight.float()


def linear(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.float().T


def expert_linear(x: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("bsrnk,bsrk->bsrn", weight[indices].float(), x.expand(*indices.shape, x.shape[-1]))


def dequantize_nvfp4(codes: Tensor, scale: Tensor, scale_2: Tensor) -> Tensor:
    packed = codes.view(torch.uint8).reshape(*scale.shape, -1)
    blocks = E2M1[torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).long()]
    return (blocks * _e4m3(scale).unsqueeze(-1)).flatten(-2) * scale_2[..., None, None]


def dequantize_fp8(codes: Tensor, scale: Tensor) -> Tensor:
    return _e4m3(codes) * scale[..., None, None]


def _e4m3(codes: Tensor) -> Tensor:
    """Return E4M3 values, or the same bytes as int8, in float32."""
    return codes.view(torch.float8_e4m3fn).float()


def route(
    logits: Tensor,
    bias: Tensor,
    *,
    top_k: int,
    n_group: int,
    topk_group: int,
    norm_topk_prob: bool,
    scaling_factor: float,
) -> tuple[Tensor, Tensor]:
    scores = logits.sigmoid()
    choice = scores + bias
    if n_group > 1:
        grouped = _unflatten(choice, n_group, -1)
        best = grouped.topk(2, dim=-1).values.sum(-1).topk(topk_group, dim=-1).indices
        allowed = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter(-1, best, True)
        choice = grouped.masked_fill(~allowed.unsqueeze(-1), -torch.inf).flatten(-2)
    indices = choice.topk(top_k, dim=-1).indices
    weights = scores.gather(-1, indices)
    if norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return indices, weights * scaling_factor


def quantize_activation(x: Tensor, scale: Tensor, *, format: str) -> Tensor:
    return ACTIVATIONS[format](x * (1 / scale)) * scale


def experts(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    inner_scale: Tensor | None = None,
    *,
    inner_format: str,
) -> Tensor:
    inner = relu2(expert_linear(x.unsqueeze(-2), indices, up))
    if inner_scale is not None:
        inner = quantize_activation(inner, inner_scale, format=inner_format)
    return combine_experts(expert_linear(inner, indices, down), weights)


def expand_experts(x: Tensor) -> Tensor:
    return x.unsqueeze(-2)


def combine_experts(y: Tensor, weights: Tensor) -> Tensor:
    return (y * weights.unsqueeze(-1)).sum(-2)


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    window = x.new_zeros(x.shape[0], x.shape[2], weight.shape[-1] - 1)
    return causal_conv1d_update(x, window, weight, bias)[0]


def causal_conv1d_update(
    x: Tensor, window: Tensor, weight: Tensor, bias: Tensor | None, counts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    columns = torch.cat((window.float(), x.transpose(1, 2)), dim=-1)
    y = F.conv1d(columns, weight.float(), bias.float() if bias is not None else None, groups=weight.shape[0])
    first = torch.full_like(columns[:, 0, 0], x.shape[1], dtype=torch.int64) if counts is None else counts
    places = first[:, None, None] + torch.arange(window.shape[-1])
    kept = columns.gather(2, places.expand(window.shape))
    return F.silu(y).transpose(1, 2), kept.to(window.dtype)


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    *,
    n_groups: int,
    chunk_size: int,
) -> Tensor:
    heads = A.shape[0]
    state = x.new_zeros(x.shape[0], heads, x.shape[-1] // heads, B.shape[-1] // n_groups)
    return ssd_update(x, dt, A, B, C, D, dt_bias, state, n_groups=n_groups, chunk_size=chunk_size)[0]


def ssd_update(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    counts: Tensor | None = None,
    *,
    n_groups: int,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    heads = A.shape[0]
    u = _unflatten(x, heads, -1)
    delta = F.softplus(dt + dt_bias)
    if counts is not None:
        delta = delta * (torch.arange(x.shape[1]) < counts[:, None])[..., None]
    b, c = (_unflatten(t, n_groups, -1).repeat_interleave(heads // n_groups, dim=2) for t in (B, C))
    h, outputs = state.float(), list[Tensor]()
    for s in range(x.shape[1]):
        step = delta[:, s, :, None, None]
        h = torch.exp(step * A[:, None, None]) * h + step * u[:, s, :, :, None] * b[:, s, :, None, :]
        outputs.append((h * c[:, s, :, None, :]).sum(-1) + D[:, None] * u[:, s])
    return torch.stack(outputs, dim=1).flatten(-2), h.to(state.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, *, num_heads: int, num_kv_heads: int) -> Tensor:
    batch, tokens, width = k.shape
    empty, none = k.new_zeros(batch, num_kv_heads, tokens, width // num_kv_heads), torch.zeros(batch, dtype=torch.int64)
    keys, values = write_cache(k, empty, none), write_cache(v, empty, none)
    places = torch.arange(tokens)
    return cached_attention(q, keys, values, none, places, num_heads=num_heads, num_kv_heads=num_kv_heads)


def write_cache(
    new: Tensor, cache: Tensor, lengths: Tensor, counts: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    _, heads, capacity, _ = cache.shape
    after = cache.clone()
    rows = _unflatten(new if scale is None else new / scale, heads, -1).transpose(1, 2)
    if cache.dtype is torch.float8_e4m3fn:
        rows = rows.clamp(-CACHE_MAX, CACHE_MAX)
    for b in range(len(lengths)):
        start = int(lengths[b])
        count = min(new.shape[1] if counts is None else int(counts[b]), capacity - start)
        after[b, :, start : start + count] = rows[b, :, :count].to(cache.dtype)
    return after


def cached_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    key_positions: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    num_heads: int,
    num_kv_heads: int,
) -> Tensor:
    places = lengths[:, None] + torch.arange(q.shape[1])
    visible = key_positions <= places[..., None]

    def read(cache: Tensor, scale: Tensor | None) -> Tensor:
        filled = cache[:, :, : len(key_positions)].float()
        return (filled if scale is None else filled * scale).repeat_interleave(num_heads // num_kv_heads, dim=1)

    heads = _unflatten(q, num_heads, -1).transpose(1, 2)
    keys, values = read(k_cache, k_scale), read(v_cache, v_scale)
    y = F.scaled_dot_product_attention(heads, keys, values, attn_mask=visible[:, None])
    return y.transpose(1, 2).flatten(-2)


EVALUATORS: Mapping[str, Callable[..., Any]] = {
    f.__name__: f
    for f in (
        embedding,
        shift_left,
        last_token,
        add,
        relu2,
        concat,
        split,
        rms_norm,
        gated_rms_norm,
        linear,
        expert_linear,
        dequantize_nvfp4,
        dequantize_fp8,
        quantize_activation,
        route,
        experts,
        expand_experts,
        combine_experts,
        causal_conv1d,
        causal_conv1d_update,
        ssd,
        ssd_update,
        attention,
        write_cache,
        cached_attention,
    )
}
"""Op name → its evaluation; a test compares the names with those of `n3c.ir.ops`."""
