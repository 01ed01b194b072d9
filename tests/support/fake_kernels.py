"""The kernels of the torch engine, as their equations say, for a CPU; whatever is not as they demand fails."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from n3c.runtime.engines.reference import ops
from n3c.runtime.engines.torch.kernel_operations import Kernels
from n3c.runtime.engines.torch.packed import PackedWeight


def fake_kernels(called: list[str]) -> Kernels:
    """Return kernels that note their names in `called`."""

    def few_rows_linear(x: Tensor, weight: PackedWeight) -> Tensor:
        called.append("few_rows_linear")
        assert x.dim() == 2 and len(x) <= 16 and x.dtype == torch.bfloat16
        return _product(x, weight)

    def many_rows_linear(x: Tensor, weight: PackedWeight) -> Tensor:
        called.append("many_rows_linear")
        assert x.dim() == 2 and weight.format != "bf16"
        return _product(x, weight)

    def routed_experts(x: Tensor, chosen: Tensor, weights: Tensor, up: PackedWeight, down: PackedWeight) -> Tensor:
        called.append("routed_experts")
        assert chosen.dtype == torch.int64 and weights.dtype == torch.float32 and x.dim() == chosen.dim() == 2
        matrices = [w.dequantized(torch.float32) for w in (up, down)]
        return _experts(x, chosen, weights, *matrices)

    def mamba2_step(
        projected: Tensor,
        window: Tensor,
        ssm: Tensor,
        conv_weight: Tensor,
        conv_bias: Tensor | None,
        A_log: Tensor,
        D: Tensor,
        dt_bias: Tensor,
        *,
        groups: int,
        counts: Tensor | None,
        advance: bool,
    ) -> Tensor:
        called.append("mamba2_step")
        _, heads, channels, size = ssm.shape
        inner, shared = heads * channels, groups * size
        _, x, dt = projected.float().split([inner, inner + 2 * shared, heads], dim=-1)
        y, kept = ops.causal_conv1d_update(x, window.mT, conv_weight[:, None], conv_bias, counts)
        u, B, C = y.to(projected.dtype).float().split([inner, shared, shared], dim=-1)
        A = -A_log.float().exp()
        y, state = ops.ssd_update(
            u, dt, A, B, C, D.float(), dt_bias.float(), ssm, counts, n_groups=groups, chunk_size=1
        )
        if advance:
            window.copy_(kept.mT)
            ssm.copy_(state)
        return y.to(projected.dtype)

    def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
        called.append("gated_rms_norm")
        return ops.gated_rms_norm(y.float(), z.float(), weight, groups=groups, eps=eps).to(z.dtype)

    def cached_attention(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
        called.append("cached_attention")
        assert q.dtype == keys.dtype == values.dtype == torch.bfloat16
        places = lengths[:, None] + torch.arange(q.shape[2])
        mask = torch.arange(keys.shape[2]) <= places[:, None, :, None]
        wide: Any = (t.float() for t in (q, keys, values))
        return F.scaled_dot_product_attention(*wide, attn_mask=mask, enable_gqa=True).to(q.dtype)

    return Kernels(
        few_rows_linear, many_rows_linear, routed_experts, mamba2_step, gated_rms_norm, cached_attention
    )


def _product(x: Tensor, weight: PackedWeight) -> Tensor:
    return (x.float() @ weight.dequantized(torch.float32).T).to(x.dtype)


def _experts(x: Tensor, chosen: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    inner = torch.einsum("til,tl->ti", up[chosen].flatten(0, 1), x.float().repeat_interleave(chosen.shape[1], 0))
    y = torch.einsum("tli,ti->tl", down[chosen].flatten(0, 1), F.relu(inner).square())
    return (y.view(*chosen.shape, -1) * weights[..., None]).sum(1).to(x.dtype)
