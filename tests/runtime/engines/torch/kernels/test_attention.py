"""Attention over a cache, in Triton's interpreter, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from n3c.runtime.engines.torch.kernels import attention
from n3c.runtime.engines.torch.kernels.attention import cached_attention

from .weights import error


@pytest.fixture(autouse=True)
def many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SMS", 8)


def reference(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    heads, tokens, channels = q.shape[1:]
    repeats = heads // keys.shape[1]
    k, v = (t.double().repeat_interleave(repeats, 1) for t in (keys, values))
    scores = q.double() @ k.mT / channels**0.5
    seen = torch.arange(keys.shape[2]) <= lengths[:, None, None] + torch.arange(tokens)[:, None]  # [B, T, C]
    scores = scores.masked_fill(~seen[:, None], -float("inf"))
    y: Tensor = scores.softmax(-1) @ v
    return y


@pytest.mark.parametrize(
    ("batch", "heads", "key_heads", "tokens", "capacity", "channels", "lengths"),
    [
        (1, 4, 2, 1, 300, 16, [299]),
        (2, 4, 1, 1, 130, 16, [0, 64]),
        (2, 6, 2, 3, 200, 24, [0, 195]),
        (1, 32, 2, 4, 70, 128, [63]),
        (3, 2, 2, 8, 40, 16, [1, 15, 32]),
    ],
)
def test_cached_attention(
    batch: int, heads: int, key_heads: int, tokens: int, capacity: int, channels: int, lengths: list[int]
) -> None:
    q = torch.randn(batch, heads, tokens, channels)
    keys, values = (torch.randn(batch, key_heads, capacity, channels) for _ in range(2))
    exact = reference(q, keys, values, torch.tensor(lengths))
    for row, length in enumerate(lengths):  # what is behind the tokens was never written
        keys[row, :, length + tokens :] = float("nan")
        values[row, :, length + tokens :] = float("nan")
    y = cached_attention(q, keys, values, torch.tensor(lengths))
    assert error(y, exact) < 2e-6


def test_bfloat16() -> None:
    q, keys, values = (torch.randn(1, heads, n, 16).bfloat16() for heads, n in ((4, 2), (2, 90), (2, 90)))
    y = cached_attention(q, keys, values, torch.tensor([80]))
    assert y.dtype == torch.bfloat16
    assert error(y, reference(q, keys, values, torch.tensor([80]))) < 1e-2


def test_large_scores() -> None:
    """Weights come from differences to the maximum, over parts of the context too."""
    q, keys, values = torch.randn(1, 2, 1, 16) * 50, torch.randn(1, 1, 400, 16), torch.randn(1, 1, 400, 16)
    y = cached_attention(q, keys, values, torch.tensor([399]))
    assert error(y, reference(q, keys, values, torch.tensor([399]))) < 1e-5
