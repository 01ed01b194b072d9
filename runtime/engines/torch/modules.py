"""The modules that take the place of a generated model's own, with the same results: weights packed, kernels if any."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .activations import Activation
from .operations import Operations
from .packed import PackedWeight


class PackedLinear(nn.Module):
    """y [..., N] = x [..., K] W^T."""

    def __init__(
        self,
        weight: PackedWeight,
        operations: Operations,
        dtype: torch.dtype | None = None,
        activation: Activation | None = None,
    ) -> None:
        """Take the type of y where it is not that of x, and what x is rounded to."""
        super().__init__()
        self._weight, self._operations, self._dtype, self._activation = weight, operations, dtype, activation

    def forward(self, x: Tensor) -> Tensor:
        """Return y."""
        rows, dtype = x.flatten(0, -2), self._dtype or x.dtype
        rows = self._operations.linear(rows, self._weight, dtype, activation=self._activation)
        return rows.view(*x.shape[:-1], -1)


class _UpAndDown(nn.Module):
    """Two linears."""

    def __init__(
        self,
        up: PackedWeight,
        down: PackedWeight,
        operations: Operations,
        activations: tuple[Activation | None, Activation | None] = (None, None),
    ) -> None:
        """Take what each of both linears reads rounded."""
        super().__init__()
        self._up, self._down, self._operations, self._activations = up, down, operations, activations


class PackedMlp(_UpAndDown):
    """down(relu(up(x))^2)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, S, D] for x [B, S, D]."""
        outer, inner = self._activations
        linear = self._operations.linear
        active = linear(x.flatten(0, -2), self._up, x.dtype, activation=outer, squared_relu=True)
        return linear(active, self._down, x.dtype, activation=inner).view_as(x)


class PackedExperts(_UpAndDown):
    """sum over the chosen experts of weight_e * down_e(relu(up_e(x))^2)."""

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """Return [B, S, L] for x [B, S, L], experts and weights [B, S, K], in the type of x."""
        rows, chosen, shares = (t.flatten(0, -2) for t in (x, experts, weights))
        return self._operations.experts(rows, chosen, shares, self._up, self._down, self._activations).view_as(x)


class Gate(nn.Module):
    """A generated router behind the operations, one of which chooses."""

    def __init__(self, router: Any, operations: Operations, activation: Activation | None = None) -> None:
        """Take what the router's linear reads rounded."""
        super().__init__()
        self.router, self._operations, self._activation = router, operations, activation

    def forward(self, x: Tensor, batch: object) -> tuple[Tensor, Tensor, None]:
        """Return experts and weights [B, S, K] of x [B, S, D], and no statistics.

        `batch` says nothing: an entry point has no padding, as `counts` say what is real, and no given experts.
        """
        return *self._operations.route(self.router, x, self._activation), None


class Beside(nn.Module):
    """A module of an MoE that is computed beside the modules before it, as all read the same x."""

    def __init__(self, moe: nn.Module, module: nn.Module, operations: Operations) -> None:
        """Begin with `module` whenever `moe` begins."""
        super().__init__()
        self.module, self._operations = module, operations
        self._result: Callable[[], Tensor] | None = None
        moe.register_forward_pre_hook(self._begin)

    def _begin(self, moe: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._result = self._operations.beside(self.module, inputs[0])

    def forward(self, x: Tensor) -> Tensor:
        """Return the result for x, which the MoE was called with."""
        assert self._result is not None
        result, self._result = self._result, None
        return result()
