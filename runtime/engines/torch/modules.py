"""The modules that take the place of a generated model's linears and experts: the same results of packed weights."""

from __future__ import annotations

from torch import Tensor, nn

from .operations import Operations
from .packed import PackedWeight


class PackedLinear(nn.Module):
    """y [..., N] = x [..., K] W^T."""

    def __init__(self, weight: PackedWeight, operations: Operations) -> None:
        super().__init__()
        self.packed, self._operations = weight, operations

    def forward(self, x: Tensor) -> Tensor:
        """Return y in the type of x."""
        return self._operations.linear(x.flatten(0, -2), self.packed).unflatten(0, x.shape[:-1])


class PackedExperts(nn.Module):
    """sum over the chosen experts of weight_e * down_e(relu(up_e(x))^2)."""

    def __init__(self, up: PackedWeight, down: PackedWeight, operations: Operations) -> None:
        super().__init__()
        self.up, self.down, self._operations = up, down, operations

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """Return [B, S, L] for x [B, S, L], experts and weights [B, S, K], in the type of x."""
        rows, chosen, shares = (t.flatten(0, -2) for t in (x, experts, weights))
        return self._operations.experts(rows, chosen, shares, self.up, self.down).view_as(x)
