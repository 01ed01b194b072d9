"""The operations in PyTorch alone, by the functions of the generated package, with weights dequantized on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from n3c.specs.schema import Spec

from .activations import Activation, rounded
from .packed import PackedWeight


class PlainOperations:
    """What a CPU computes, and a GPU without Triton."""

    def __init__(self, package: Any, spec: Spec) -> None:
        """Take the package that is generated of `spec`; its own kernels for GPUs are used where they are installed."""
        self._package = package

    def beside(self, work: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
        """Compute it when it is asked for."""
        return partial(work, x)

    def linear(
        self,
        x: Tensor,
        weight: PackedWeight,
        dtype: torch.dtype,
        *,
        activation: Activation | None = None,
        squared_relu: bool = False,
    ) -> Tensor:
        """Multiply with the dequantized weight."""
        y = F.linear(rounded(activation, x), weight.dequantized(x.dtype)).to(dtype)
        return F.relu(y).square() if squared_relu else y

    def norm(self, norm: Any, x: Tensor) -> Tensor:
        """Run the generated module."""
        normed: Tensor = norm(x)
        return normed

    def add_norm(self, norm: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Add, then run the generated module."""
        total = x + y
        return norm(total), total

    def route(self, router: Any, x: Tensor, activation: Activation | None = None) -> tuple[Tensor, Tensor]:
        """Run the generated module."""
        chosen, weights, _ = router(rounded(activation, x))
        return chosen, weights

    def experts(
        self,
        x: Tensor,
        chosen: Tensor,
        weights: Tensor,
        up: PackedWeight,
        down: PackedWeight,
        activations: tuple[Activation | None, Activation | None] = (None, None),
    ) -> Tensor:
        """Dequantize the chosen experts, or all of them where the tokens choose more than there are."""
        outer, inner = activations
        x = rounded(outer, x)
        if chosen.numel() < up.shape[0]:
            index = chosen.flatten()  # [T * K]
            rows = x.repeat_interleave(chosen.shape[1], 0)[:, :, None]  # [T * K, L, 1]
            active = F.relu(_chosen(up, index).dequantized(x.dtype) @ rows).square().squeeze(-1)
            active = rounded(inner, active)[..., None]
            y = (_chosen(down, index).dequantized(x.dtype) @ active).view(*chosen.shape, -1)  # [T, K, L]
            return (weights[..., None] * y).sum(-2).to(x.dtype)
        grouped = self._package.grouped
        rows, counts, position = grouped.sort_by_expert(x, chosen, up.shape[0])
        active = F.relu(grouped.grouped_linear(rows, up.dequantized(x.dtype), counts)).square()
        y = grouped.grouped_linear(rounded(inner, active), down.dequantized(x.dtype), counts)
        total: Tensor = grouped.weighted_sum(y, position, weights)
        return total.to(x.dtype)

    def mamba_step(
        self, mixer: Any, projected: Tensor, window: Tensor, ssm: Tensor, counts: Tensor | None, *, advance: bool
    ) -> Tensor:
        """Convolve, then scan by chunks, or step by the one token that there is."""
        config, (batch, tokens, _) = mixer.config, projected.shape
        heads, groups = config.mamba_num_heads, config.mamba_n_groups
        inner, shared = config.mamba_inner_size, groups * config.mamba_state_size
        channels = config.mamba_conv_size
        xBC, dt = projected[..., inner : inner + channels], projected[..., inner + channels :]
        columns = torch.cat([window, xBC], dim=1)  # [B, W - 1 + T, X]
        convolved = mixer.conv1d(columns, None, None)[:, window.shape[1] :]
        u = convolved[..., :inner].reshape(batch, tokens, heads, -1)  # [B, T, H, P]
        B = convolved[..., inner : inner + shared].reshape(batch, tokens, groups, -1)  # [B, T, G, N]
        C = convolved[..., inner + shared :].reshape(batch, tokens, groups, -1)  # [B, T, G, N]
        dt = F.softplus(dt.float() + mixer.dt_bias.float())  # [B, T, H]
        if counts is not None:  # a token with dt = 0 neither decays nor adds
            dt = dt * (torch.arange(tokens, device=dt.device) < counts[:, None])[..., None]
        before = ssm.to(torch.float32, copy=tokens == 1 and not advance)  # one token is taken in in place
        scan = self._package.ssd.scan
        y, after = scan(u, dt, -mixer.A_log.float().exp(), B, C, config.mamba_chunk_size, before)
        if advance:
            if after is not ssm:
                ssm.copy_(after)
            first = counts if counts is not None else torch.full((batch,), tokens, device=dt.device)
            window.copy_(_rows(columns, first, window.shape[1]))
        y = torch.addcmul(y, mixer.D.float()[:, None], u.to(y.dtype))
        return y.flatten(-2)

    def gated_norm(self, norm: Any, y: Tensor, z: Tensor) -> Tensor:
        """Run the generated module."""
        normed: Tensor = norm(y, z)
        return normed

    def attention(
        self, q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, on_host: Sequence[int] | None
    ) -> Tensor:
        """Read the filled places where the host knows them, else the whole caches behind a mask."""
        tokens, capacity = q.shape[2], keys.shape[2]
        if on_host is not None and q.is_cuda and tokens > 1 and max(on_host) + tokens <= capacity:
            return _row_by_row(q, keys, values, on_host)
        end = capacity if on_host is None else min(max(on_host) + tokens, capacity)
        places = lengths[:, None] + torch.arange(tokens, device=q.device)  # [B, T]
        mask = torch.arange(end, device=q.device) <= places[:, None, :, None]  # [B, 1, T, end]
        return F.scaled_dot_product_attention(
            q, keys[:, :, :end].to(q.dtype), values[:, :, :end].to(q.dtype), attn_mask=mask, enable_gqa=True
        )


def _chosen(weight: PackedWeight, index: Tensor) -> PackedWeight:
    """Return the matrices of the experts `index` [M]."""
    scales, scale = weight.block_scales, weight.scale
    return PackedWeight(
        weight.format,
        weight.data[index],
        None if scales is None else scales[index],
        None if scale is None else scale[index],
        (len(index), *weight.shape[1:]),
    )


def _row_by_row(q: Tensor, keys: Tensor, values: Tensor, lengths: Sequence[int]) -> Tensor:
    """Attend sequence by sequence: a causal mask that is not written out has kernels that need no memory for scores."""
    from torch.nn.attention.bias import CausalBias, CausalVariant  # brings the compiler along, with a folder of its own

    parts: list[Tensor] = []
    for row, length in enumerate(lengths):
        end = length + q.shape[2]
        k, v = (cache[row : row + 1, :, :end].to(q.dtype) for cache in (keys, values))
        mask = CausalBias(CausalVariant.LOWER_RIGHT, q.shape[2], end)
        parts.append(F.scaled_dot_product_attention(q[row : row + 1], k, v, attn_mask=mask, enable_gqa=True))
    return torch.cat(parts)


def _rows(x: Tensor, first: Tensor, count: int) -> Tensor:
    """Return `count` rows of each x [B, S, X], from row `first` [B] on."""
    index = first[:, None] + torch.arange(count, device=x.device)
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
