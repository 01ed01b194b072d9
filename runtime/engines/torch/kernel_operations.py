"""The operations by Triton's kernels where these are faster than PyTorch; the rest is that of `plain`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .operations import MakeOperations
from .packed import PackedWeight
from .plain import PlainOperations

FEW = 16
"""Rows, or tokens of a sequence, up to which a kernel takes them all at once."""


@dataclass(frozen=True, slots=True)
class Kernels:
    """The kernels of `n3c.runtime.engines.torch.kernels`, by name. Activations are BF16."""

    few_rows_linear: Callable[[Tensor, PackedWeight], Tensor]
    many_rows_linear: Callable[[Tensor, PackedWeight], Tensor]
    routed_experts: Callable[[Tensor, Tensor, Tensor, PackedWeight, PackedWeight], Tensor]
    mamba2_step: Callable[..., Tensor]
    gated_rms_norm: Callable[[Tensor, Tensor, Tensor, int, float], Tensor]
    cached_attention: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def kernel_operations() -> MakeOperations:
    """Return what makes the operations of a GPU: by kernels where Triton is installed, else by PyTorch."""
    if importlib.util.find_spec("triton") is None:
        return PlainOperations
    from .kernels.attention import cached_attention
    from .kernels.experts import routed_experts
    from .kernels.gated_norm import gated_rms_norm
    from .kernels.linear import few_rows_linear, many_rows_linear
    from .kernels.mamba_step import mamba2_step

    kernels = Kernels(
        few_rows_linear, many_rows_linear, routed_experts, mamba2_step, gated_rms_norm, cached_attention
    )
    return partial(KernelOperations, kernels=kernels)


class KernelOperations(PlainOperations):
    """What a GPU with Triton computes. A model in float32 is that of `plain`, as its products have no such kernels."""

    def __init__(self, package: Any, kernels: Kernels) -> None:
        """Take the generated package, for what no kernel computes."""
        super().__init__(package)
        self._kernels = kernels

    def linear(self, x: Tensor, weight: PackedWeight) -> Tensor:
        """Dequantize in registers; a weight in BF16 needs no kernel where rows fill the tiles of tensor cores."""
        if x.dtype != torch.bfloat16:
            return super().linear(x, weight)
        if len(x) <= FEW:
            return self._kernels.few_rows_linear(x, weight)
        return super().linear(x, weight) if weight.format == "bf16" else self._kernels.many_rows_linear(x, weight)

    def experts(self, x: Tensor, chosen: Tensor, weights: Tensor, up: PackedWeight, down: PackedWeight) -> Tensor:
        """Read the chosen experts only, each once for all of its tokens."""
        if x.dtype != torch.bfloat16:
            return super().experts(x, chosen, weights, up, down)
        return self._kernels.routed_experts(x, chosen, weights, up, down)

    def mamba_step(
        self, mixer: Any, projected: Tensor, window: Tensor, ssm: Tensor, counts: Tensor | None, *, advance: bool
    ) -> Tensor:
        """Move a float32 state on in place by few tokens; whole chunks are scanned."""
        if projected.dtype != torch.bfloat16 or ssm.dtype != torch.float32 or projected.shape[1] > FEW:
            return super().mamba_step(mixer, projected, window, ssm, counts, advance=advance)
        return self._kernels.mamba2_step(
            projected,
            window,
            ssm,
            mixer.conv1d.weight[:, 0],
            getattr(mixer.conv1d, "bias", None),
            mixer.A_log,
            mixer.D,
            mixer.dt_bias,
            groups=mixer.config.mamba_n_groups,
            counts=counts,
            advance=advance,
        )

    def gated_norm(self, norm: Any, y: Tensor, z: Tensor) -> Tensor:
        """Gate and norm in one kernel."""
        if z.dtype != torch.bfloat16:
            return super().gated_norm(norm, y, z)
        return self._kernels.gated_rms_norm(y, z, norm.weight, norm.groups, norm.eps)

    def attention(
        self, q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, on_host: Sequence[int] | None
    ) -> Tensor:
        """Read lengths on the device for few tokens, so that nothing is read beyond them in a recorded call either."""
        if q.shape[2] > FEW or not q.dtype == keys.dtype == torch.bfloat16:
            return super().attention(q, keys, values, lengths, on_host)
        return self._kernels.cached_attention(q, keys, values, lengths)
