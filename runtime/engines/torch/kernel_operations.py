"""The operations by Triton's kernels where there is one for them; the rest is that of `plain`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from n3c.specs.schema import Spec

from .activations import Activation
from .operations import MakeOperations
from .packed import PackedWeight
from .plain import PlainOperations

MOST_STEPS = 8
"""Tokens of a sequence up to which the Mamba-2 step is made; more are scanned by chunks."""
MOST_QUERIES = 128
"""Queries that share a key head, of all tokens of a sequence, up to which they are one tile; more is for PyTorch."""
MOST_BESIDE = 64
"""Rows up to which work is done on a stream of its own."""
MOST_ROUTED = 64
"""Rows up to which a router's product is a kernel's; beyond it is the generated module's, in float32 as well."""


@dataclass(frozen=True, slots=True)
class Kernels:
    """The kernels of `n3c.runtime.engines.torch.kernels`, by name."""

    few_rows_linear: Callable[..., Tensor]
    many_rows_linear: Callable[..., Tensor]
    rounded: Callable[[Activation | None, Tensor], Tensor]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    route: Callable[..., tuple[Tensor, Tensor]]
    routed_experts: Callable[..., Tensor]
    mamba2_step: Callable[..., Tensor]
    gated_rms_norm: Callable[[Tensor, Tensor, Tensor, int, float], Tensor]
    cached_attention: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def kernel_operations() -> MakeOperations:
    """Return what makes the operations of a GPU: by kernels where Triton is installed, else by PyTorch alone."""
    if importlib.util.find_spec("triton") is None:
        return PlainOperations
    from .kernels.attention import cached_attention
    from .kernels.experts import routed_experts
    from .kernels.gated_norm import gated_rms_norm
    from .kernels.linear import few_rows_linear, many_rows_linear
    from .kernels.mamba_step import mamba2_step
    from .kernels.norm import add_rms_norm, rms_norm
    from .kernels.rounding import rounded
    from .kernels.router import route

    kernels = Kernels(
        few_rows_linear=few_rows_linear,
        many_rows_linear=many_rows_linear,
        rounded=rounded,
        rms_norm=rms_norm,
        add_rms_norm=add_rms_norm,
        route=route,
        routed_experts=routed_experts,
        mamba2_step=mamba2_step,
        gated_rms_norm=gated_rms_norm,
        cached_attention=cached_attention,
    )
    return partial(KernelOperations, kernels=kernels)


class KernelOperations(PlainOperations):
    """What a GPU with Triton computes."""

    def __init__(self, package: Any, spec: Spec, kernels: Kernels) -> None:
        """Take the generated package, for what no kernel computes."""
        super().__init__(package, spec)
        self._moe, self._kernels = spec.moe, kernels
        self._stream: torch.cuda.Stream | None = None

    def beside(self, work: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
        """Compute it on a stream of its own where few rows leave much of the GPU idle."""
        if not x.is_cuda or x.numel() > MOST_BESIDE * x.shape[-1]:
            return super().beside(work, x)
        if self._stream is None:
            self._stream = torch.cuda.Stream(x.device)
        side = self._stream
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            y = work(x)

        def result() -> Tensor:
            # Memory of the side stream is used again on it alone, and it waits for this stream before it begins.
            torch.cuda.current_stream().wait_stream(side)
            return y

        return result

    def linear(
        self,
        x: Tensor,
        weight: PackedWeight,
        dtype: torch.dtype,
        *,
        activation: Activation | None = None,
        squared_relu: bool = False,
    ) -> Tensor:
        """Dequantize in registers, and write the float32 sums as they are asked for."""
        return self._kernels.many_rows_linear(x, weight, activation=activation, squared_relu=squared_relu, dtype=dtype)

    def norm(self, norm: Any, x: Tensor) -> Tensor:
        """Norm in one kernel."""
        return self._kernels.rms_norm(x, norm.weight, norm.eps)

    def add_norm(self, norm: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Add and norm in one kernel."""
        return self._kernels.add_rms_norm(y, x, norm.weight, norm.eps)

    def route(self, router: Any, x: Tensor, activation: Activation | None = None) -> tuple[Tensor, Tensor]:
        """Multiply with the router's weight as it is stored and choose in float32, of one group of experts."""
        x = self._kernels.rounded(activation, x)
        config, rows = router.config, x.flatten(0, -2)
        assert self._moe is not None
        if len(rows) > MOST_ROUTED or self._moe.n_group > 1:
            return super().route(router, x)
        weight = PackedWeight("bf16", router.weight, None, None, tuple(router.weight.shape))
        logits = self._kernels.few_rows_linear(rows, weight, dtype=torch.float32)
        chosen, weights = self._kernels.route(
            logits,
            router.e_score_correction_bias,
            config.moe_top_k,
            config.moe_routed_scaling_factor,
            normalize=self._moe.norm_topk_prob,
        )
        return chosen.view(*x.shape[:-1], -1), weights.view(*x.shape[:-1], -1)

    def experts(
        self,
        x: Tensor,
        chosen: Tensor,
        weights: Tensor,
        up: PackedWeight,
        down: PackedWeight,
        activations: tuple[Activation | None, Activation | None] = (None, None),
    ) -> Tensor:
        """Read the chosen experts only, each once for all of its tokens."""
        return self._kernels.routed_experts(x, chosen, weights, up, down, activations)

    def mamba_step(
        self, mixer: Any, projected: Tensor, window: Tensor, ssm: Tensor, counts: Tensor | None, *, advance: bool
    ) -> Tensor:
        """Move the state on in place by few tokens; whole chunks are scanned."""
        bias = getattr(mixer.conv1d, "bias", None)
        if projected.shape[1] > MOST_STEPS or bias is None:
            return super().mamba_step(mixer, projected, window, ssm, counts, advance=advance)
        return self._kernels.mamba2_step(
            projected,
            window,
            ssm,
            mixer.conv1d.weight[:, 0],
            bias,
            mixer.A_log,
            mixer.D,
            mixer.dt_bias,
            groups=mixer.config.mamba_n_groups,
            counts=counts,
            advance=advance,
        )

    def gated_norm(self, norm: Any, y: Tensor, z: Tensor) -> Tensor:
        """Gate and norm in one kernel."""
        return self._kernels.gated_rms_norm(y, z, norm.weight, norm.groups, norm.eps)

    def attention(
        self, q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, on_host: Sequence[int] | None
    ) -> Tensor:
        """Read lengths on the device for few tokens, so that nothing is read beyond them in a recorded call either."""
        sharing = q.shape[1] // keys.shape[1] * q.shape[2]
        if sharing > MOST_QUERIES or keys.dtype not in (torch.bfloat16, torch.float32):
            return super().attention(q, keys, values, lengths, on_host)
        return self._kernels.cached_attention(q, keys, values, lengths)
