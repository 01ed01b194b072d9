"""The kernels of the torch engine, as their equations say, for a CPU; whatever is not as they demand fails."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from n3c.runtime.engines.reference import ops
from n3c.runtime.engines.torch.activations import Activation, rounded
from n3c.runtime.engines.torch.kernel_operations import Kernels
from n3c.runtime.engines.torch.packed import PackedWeight


def fake_kernels(called: list[str]) -> Kernels:
    """Return kernels that note their names in `called`."""

    def few_rows_linear(x: Tensor, weight: PackedWeight, *, dtype: torch.dtype) -> Tensor:
        called.append("few_rows_linear")
        assert x.dim() == 2 and len(x) <= 64
        return _product(x, weight, dtype)

    def many_rows_linear(
        x: Tensor, weight: PackedWeight, *, activation: Activation | None, squared_relu: bool, dtype: torch.dtype
    ) -> Tensor:
        called.append("many_rows_linear")
        assert x.dim() == 2
        y = _product(rounded(activation, x), weight, torch.float32)
        return (ops.relu2(y) if squared_relu else y).to(dtype)

    def rounding(activation: Activation | None, x: Tensor) -> Tensor:
        called.append("rounded")
        return rounded(activation, x)

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        called.append("rms_norm")
        return ops.rms_norm(x.float(), weight, eps=eps).to(x.dtype)

    def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        called.append("add_rms_norm")
        total = (x.float() + residual.float()).to(residual.dtype)
        return ops.rms_norm(total.float(), weight, eps=eps).to(x.dtype), total

    def route(logits: Tensor, bias: Tensor, top_k: int, scaling: float, *, normalize: bool) -> tuple[Tensor, Tensor]:
        called.append("route")
        assert logits.dim() == 2 and logits.dtype == bias.dtype == torch.float32
        options = {"n_group": 1, "topk_group": 1, "norm_topk_prob": normalize, "scaling_factor": scaling}
        return ops.route(logits, bias, top_k=top_k, **options)  # type: ignore[arg-type]

    def routed_experts(
        x: Tensor,
        chosen: Tensor,
        weights: Tensor,
        up: PackedWeight,
        down: PackedWeight,
        activations: tuple[Activation | None, Activation | None] = (None, None),
    ) -> Tensor:
        called.append("routed_experts")
        assert chosen.dtype == torch.int64 and weights.dtype == torch.float32 and x.dim() == chosen.dim() == 2
        matrices = up.dequantized(torch.float32), down.dequantized(torch.float32)
        outer, inner = activations
        return _experts(rounded(outer, x), chosen, weights, *matrices, inner)

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
        return y

    def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
        called.append("gated_rms_norm")
        return ops.gated_rms_norm(y.float(), z.float(), weight, groups=groups, eps=eps).to(z.dtype)

    def cached_attention(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
        called.append("cached_attention")
        assert q.shape[2] <= 16 and keys.dtype == values.dtype and keys.is_contiguous() and values.is_contiguous()
        places = lengths[:, None] + torch.arange(q.shape[2])
        mask = torch.arange(keys.shape[2]) <= places[:, None, :, None]
        y = F.scaled_dot_product_attention(q.float(), keys.float(), values.float(), attn_mask=mask, enable_gqa=True)
        return y.to(q.dtype)

    return Kernels(
        few_rows_linear,
        many_rows_linear,
        rounding,
        rms_norm,
        add_rms_norm,
        route,
        routed_experts,
        mamba2_step,
        gated_rms_norm,
        cached_attention,
    )


def _product(x: Tensor, weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    return (x.float() @ weight.dequantized(torch.float32).T).to(dtype)


def _experts(
    x: Tensor, chosen: Tensor, weights: Tensor, up: Tensor, down: Tensor, activation: Activation | None
) -> Tensor:
    inner = torch.einsum("til,tl->ti", up[chosen].flatten(0, 1), x.float().repeat_interleave(chosen.shape[1], 0))
    y = torch.einsum("tli,ti->tl", down[chosen].flatten(0, 1), rounded(activation, ops.relu2(inner)))
    return (y.view(*chosen.shape, -1) * weights[..., None]).sum(1).to(x.dtype)
