"""Mamba-2 on a state, in Triton's interpreter, against the recurrence in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from n3c.runtime.engines.torch.kernels.mamba_step import mamba2_step

from .weights import error


@dataclass
class Case:
    """Random operands of `mamba2_step`: [B, T] tokens, H heads of P channels in G groups, a state of N."""

    B: int = 2
    T: int = 1
    H: int = 4
    P: int = 8
    N: int = 16
    G: int = 2
    W: int = 4
    state: torch.dtype = torch.float32
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        self.inner, self.X = self.H * self.P, self.H * self.P + 2 * self.G * self.N
        torch.manual_seed(self.T)
        self.projected = torch.randn(self.B, self.T, self.inner + self.X + self.H).to(self.dtype)
        self.projected[..., -self.H :] *= 4  # from tiny to large steps
        self.window = torch.randn(self.B, self.W - 1, self.X).to(self.dtype)
        self.ssm = torch.randn(self.B, self.H, self.P, self.N).to(self.state)
        self.weights = (
            torch.randn(self.X, self.W),
            torch.randn(self.X),
            torch.arange(1, self.H + 1).log(),
            torch.randn(self.H),
            torch.randn(self.H) - 4,
        )

    def run(self, counts: Tensor | None = None, advance: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        window, ssm = self.window.clone(), self.ssm.clone()
        options = {"groups": self.G, "counts": counts, "advance": advance}
        return mamba2_step(self.projected, window, ssm, *self.weights, **options), window, ssm  # type: ignore[arg-type]

    def reference(self, row: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return y [count, inner], the window and the state of a sequence after `count` tokens, in float64."""
        conv_weight, conv_bias, A_log, D, dt_bias = (weight.double() for weight in self.weights)
        _, xBC, dt = self.projected[row, :count].double().split([self.inner, self.X, self.H], dim=-1)
        tokens = torch.cat([self.window[row].double(), xBC])
        h, ys = self.ssm[row].double(), []
        for t in range(count):
            value = F.silu((tokens[t : t + self.W] * conv_weight.T).sum(0) + conv_bias)
            value = value.to(self.dtype).double()
            u = value[: self.inner].view(self.H, self.P)
            by_group = value[self.inner :].view(2, self.G, self.N)
            B, C = by_group.repeat_interleave(self.H // self.G, 1)  # [H, N]
            step = F.softplus(dt[t] + dt_bias)
            decay = torch.exp(-A_log.exp() * step)
            h = decay[:, None, None] * h + (step[:, None] * u)[..., None] * B[:, None]
            ys.append((h @ C[..., None])[..., 0] + D[:, None] * u)
        y = torch.stack(ys).flatten(1) if ys else torch.zeros(0, self.inner, dtype=torch.float64)
        return y, tokens[count:], h


@pytest.mark.parametrize(
    "case",
    [
        Case(T=1),
        Case(T=2),
        Case(T=3),
        Case(T=8, B=1),
        Case(T=1, P=5, N=12, H=3, G=3),
        Case(T=2, W=2),
        Case(B=1, H=2, P=32, N=128),
    ],
    ids=repr,
)
def test_step(case: Case) -> None:
    y, window, ssm = case.run()
    for row in range(case.B):
        exact, exact_window, exact_ssm = case.reference(row, case.T)
        assert error(y[row], exact) < 2e-6
        assert error(ssm[row], exact_ssm) < 1e-6
        assert torch.equal(window[row].double(), exact_window)


def test_padding_changes_no_state() -> None:
    case = Case(B=4, T=3)
    counts = torch.tensor([0, 3, 1, 2])
    y, window, ssm = case.run(counts)
    for row, count in enumerate(counts.tolist()):
        exact, exact_window, exact_ssm = case.reference(row, count)
        assert error(y[row, :count], exact) < 2e-6
        assert error(ssm[row], exact_ssm) < 1e-6
        assert torch.equal(window[row].double(), exact_window)


def test_a_state_that_does_not_advance() -> None:
    case = Case(T=2)
    y, window, ssm = case.run(advance=False)
    assert torch.equal(window, case.window) and torch.equal(ssm, case.ssm)
    assert torch.equal(y, case.run()[0])


def test_bfloat16() -> None:
    case = Case(T=2, dtype=torch.bfloat16, state=torch.bfloat16)
    y, window, ssm = case.run()
    assert y.dtype == torch.float32 and ssm.dtype == window.dtype == torch.bfloat16
    for row in range(case.B):
        exact, exact_window, exact_ssm = case.reference(row, case.T)
        assert error(y[row], exact) < 1e-2
        assert error(ssm[row], exact_ssm) < 1e-2
        assert torch.equal(window[row].double(), exact_window)


def test_steps_of_every_size_are_exact() -> None:
    """dt from 1e-9 to 100: log(1 + exp(x)) does not lose its digits where it is small."""
    case = Case(B=1, T=1, H=64, P=4, G=1)
    case.projected[..., -64:] = torch.linspace(-20, 100, 64)
    case.ssm.zero_()
    ssm = case.run()[2]
    exact = case.reference(0, 1)[2]
    assert float(((ssm[0] - exact).abs() / exact.abs()).max()) < 1e-5
