"""The norms and the router, in Triton's interpreter, against PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from n3c.runtime.engines.torch.kernels.gated_norm import gated_rms_norm
from n3c.runtime.engines.torch.kernels.norm import add_rms_norm, rms_norm
from n3c.runtime.engines.torch.kernels.router import route

from .weights import error


@pytest.mark.parametrize("width", [8, 100, 2688])
def test_rms_norm(width: int) -> None:
    x, weight = torch.randn(2, 3, width), torch.randn(width)
    assert error(rms_norm(x, weight, 1e-5), F.rms_norm(x.double(), [width], weight.double(), 1e-5)) < 1e-6
    half = x.bfloat16()
    assert error(rms_norm(half, weight, 1e-5), F.rms_norm(half.double(), [width], weight.double(), 1e-5)) < 6e-3


def test_add_rms_norm() -> None:
    x, residual, weight = torch.randn(5, 36), torch.randn(5, 36), torch.randn(36)
    y, total = add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    assert error(y, F.rms_norm(total.double(), [36], weight.double(), 1e-5)) < 1e-6


@pytest.mark.parametrize(("groups", "size"), [(1, 24), (8, 20), (2, 64)])
def test_gated_rms_norm(groups: int, size: int) -> None:
    width = groups * size
    wide, weight = torch.randn(2, 3, width + 7), torch.randn(width)
    y, z = torch.randn(2, 3, width), wide[..., :width]  # z as a slice of the projection
    exact = (y.double() * F.silu(z.double())).unflatten(-1, (groups, size))
    exact = F.rms_norm(exact, [size], eps=1e-5).flatten(-2) * weight.double()
    assert error(gated_rms_norm(y, z, weight, groups, 1e-5), exact) < 1e-6


@pytest.mark.parametrize(("experts", "top_k"), [(128, 6), (9, 9), (20, 1)])
@pytest.mark.parametrize("normalize", [True, False])
def test_route(experts: int, top_k: int, normalize: bool) -> None:
    logits, bias = torch.randn(5, experts), torch.randn(experts) / 4
    scores = logits.sigmoid()
    expected = (scores + bias).topk(top_k).indices
    kept = scores.gather(-1, expected)
    if normalize:
        kept = kept / (kept.sum(-1, keepdim=True) + 1e-20)
    chosen, weights = route(logits, bias, top_k, 2.5, normalize=normalize)
    assert torch.equal(chosen, expected)
    assert error(weights, kept * 2.5) < 1e-6


def test_the_lower_of_equal_experts_comes_first() -> None:
    chosen, weights = route(torch.zeros(1, 6), torch.tensor([0.0, 1, 0, 1, 0, 0]), 4, 1.0)
    assert chosen.tolist() == [[1, 3, 0, 2]]
    assert weights.tolist() == [[0.25] * 4]
