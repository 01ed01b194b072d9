"""The operations that PyTorch and kernels compute in ways of their own: linears, experts, Mamba-2, attention.

Sizes have the letters of the generated code: B sequences, T tokens of each in this call (or rows of all of them), D
hidden size; H heads of P channels, N state size, G groups, X channels of the convolution, W taps; E experts, K of each
token, L width, I inner width; J query heads, Y key and value heads, Z channels of a head, C tokens that a cache holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from n3c.specs.schema import Spec

from .activations import Activation
from .packed import PackedWeight


class Operations(Protocol):
    """What the modules of an engine are made of. Nothing waits for the device, unless it is said so."""

    def beside(self, work: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
        """Return what gives the result of `work` for x, which may be computed beside all that is asked for before."""
        ...

    def linear(
        self,
        x: Tensor,
        weight: PackedWeight,
        dtype: torch.dtype,
        *,
        activation: Activation | None = None,
        squared_relu: bool = False,
    ) -> Tensor:
        """Return x [T, K] W^T as [T, N] of type `dtype`, or the square of its positive part; x rounded first."""
        ...

    def norm(self, norm: Any, x: Tensor) -> Tensor:
        """Return the norm of x [B, T, D] by a generated module."""
        ...

    def add_norm(self, norm: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the norm of x + y, and x + y."""
        ...

    def route(self, router: Any, x: Tensor, activation: Activation | None = None) -> tuple[Tensor, Tensor]:
        """Return the experts [B, T, K] int64 that a router chooses for x [B, T, D], and their weights.

        x is rounded first.
        """
        ...

    def experts(
        self,
        x: Tensor,
        chosen: Tensor,
        weights: Tensor,
        up: PackedWeight,
        down: PackedWeight,
        activations: tuple[Activation | None, Activation | None] = (None, None),
    ) -> Tensor:
        """Return the weighted sum [T, L] of the chosen experts [T, K] of each x [T, L].

        What `up` and what `down` reads is rounded first.
        """
        ...

    def mamba_step(
        self, mixer: Any, projected: Tensor, window: Tensor, ssm: Tensor, counts: Tensor | None, *, advance: bool
    ) -> Tensor:
        """Return y [B, T, H * P] of T tokens after the state, with D u in it and before the gated norm.

        `projected` [B, T, H * P + X + H] is what in_proj gives: z, which is not read, xBC and dt. With `advance`
        `window` [B, W - 1, X] and `ssm` [B, H, P, N] become, in place, what they are after `counts` [B] tokens (None:
        all); the results of tokens after those mean nothing.
        """
        ...

    def gated_norm(self, norm: Any, y: Tensor, z: Tensor) -> Tensor:
        """Return the mixer's gated norm of y [B, T, H * P] and z of that shape."""
        ...

    def attention(
        self, q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, on_host: Sequence[int] | None
    ) -> Tensor:
        """Return [B, J, T, Z]: token t of a sequence attends to the places up to lengths + t of its caches.

        The call's own tokens are in the caches [B, Y, C, Z] already. `on_host` are the lengths [B] where the host
        knows them, so that only filled places are read; None where the call is recorded and serves all lengths.
        """
        ...


MakeOperations = Callable[[Any, Spec], Operations]
"""Makes them for a package that is generated of a spec."""
