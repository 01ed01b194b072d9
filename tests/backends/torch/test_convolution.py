"""The convolution of Mamba-2: which of the implementations computes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from .generated import generate, tiny_spec


@pytest.fixture(scope="module")
def convolution() -> Any:
    return generate(tiny_spec()).convolution


@pytest.mark.parametrize(
    ("channels", "taps", "width", "reached", "theirs"),
    [
        (16, 4, 24, True, True),
        (16, 3, 24, True, True),
        (16, 4, 24, False, False),  # what dispatch.py keeps from it
        (12, 4, 24, True, False),
        (16, 5, 24, True, False),
        (16, 4, 20, True, False),  # tokens that do not begin at 16 bytes
    ],
)
def test_causal_conv1d_computes_what_it_supports(
    convolution: Any,
    monkeypatch: pytest.MonkeyPatch,
    channels: int,
    taps: int,
    width: int,
    reached: bool,
    theirs: bool,
) -> None:
    """It takes channels before tokens, and is told the documents."""
    x, documents = torch.randn(2, 5, width)[..., :channels], torch.zeros(2, 5, dtype=torch.int32)
    weight, bias = torch.randn(channels, taps), torch.randn(channels)
    answer = torch.randn(2, channels, 5)

    def kernel(given: Tensor, *others: Tensor, seq_idx: Tensor, activation: str) -> Tensor:
        assert torch.equal(given, x.mT) and seq_idx is documents and activation == "silu"
        assert [other.shape for other in others] == [weight.shape, bias.shape]
        return answer

    def reaches(_: Tensor) -> bool:
        return reached

    ours = convolution.causal_conv1d(x, weight, bias, documents)
    monkeypatch.setattr(convolution, "conv_kernel", kernel)
    monkeypatch.setattr(convolution, "mamba_ssm_reaches", reaches)
    found = convolution.causal_conv1d(x, weight, bias, documents)
    assert torch.equal(found, answer.mT if theirs else ours)
