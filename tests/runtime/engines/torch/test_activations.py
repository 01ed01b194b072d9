"""What the torch engine rounds activations to is what the op means."""

from __future__ import annotations

import pytest
import torch

from n3c.runtime.engines.reference.ops import quantize_activation
from n3c.runtime.engines.torch.activations import Activation, rounded


@pytest.mark.parametrize("format_", ["fp8", "nvfp4"])
def test_rounded_as_the_reference_does(format_: str) -> None:
    """Ordinary values, ties, blocks of zeros, tiny ones and ones beyond the scale."""
    scale = torch.tensor(1 / 128)
    ties = torch.tensor([0.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, -0.25, -2.5, -5.0, 4.0, 1.0, 0.5, -6.0])
    x = torch.randn(30, 64, generator=torch.Generator().manual_seed(0))
    x[0] = torch.cat([ties, ties * 448, torch.zeros(16), ties * 1e-4]) / 128
    x[1, :2] = torch.tensor([1e5, -1e-7])
    actual = rounded(Activation(format_, scale), x)
    assert torch.equal(actual, quantize_activation(x, scale, format=format_))
    assert 0.003 < float((actual[2:] - x[2:]).norm() / x[2:].norm()) < 0.2
    assert rounded(None, x) is x
