"""Routed experts, in Triton's interpreter, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from n3c.runtime.engines.torch.kernels import experts
from n3c.runtime.engines.torch.kernels.experts import routed_experts
from n3c.runtime.engines.torch.packed import Format, PackedWeight

from .weights import FORMATS, error, random_weight


def reference(x: Tensor, chosen: Tensor, weights: Tensor, up: PackedWeight, down: PackedWeight) -> Tensor:
    ups, downs = up.dequantized(torch.float64), down.dequantized(torch.float64)
    y = torch.zeros(x.shape, dtype=torch.float64)
    for t, row in enumerate(x.double()):
        for k, e in enumerate(chosen[t].tolist()):
            y[t] += weights[t, k].double() * (downs[e] @ (ups[e] @ row).relu().square())
    return y


def distinct(tokens: int, count: int, top_k: int) -> Tensor:
    return torch.stack([torch.randperm(count)[:top_k] for _ in range(tokens)])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_few_pairs(format: Format, tokens: int) -> None:
    up, down = random_weight(format, 6, 48, 32, seed=1), random_weight(format, 6, 32, 48, seed=2)
    x, chosen, weights = torch.randn(tokens, 32), distinct(tokens, 6, 3), torch.rand(tokens, 3)
    y = routed_experts(x, chosen, weights, up, down)
    assert error(y, reference(x, chosen, weights, up, down)) < 3e-6


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tokens", [3, 40])
def test_sorted_pairs(format: Format, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts 4 and 5 have no pairs."""
    monkeypatch.setattr(experts, "FEW_PAIRS", 1)
    up, down = random_weight(format, 6, 48, 32, seed=1), random_weight(format, 6, 32, 48, seed=2)
    x, chosen, weights = torch.randn(tokens, 32), distinct(tokens, 4, 3), torch.rand(tokens, 3)
    y = routed_experts(x, chosen, weights, up, down)
    assert error(y, reference(x, chosen, weights, up, down)) < 3e-6


@pytest.mark.parametrize("few_pairs", [1, 512])
def test_all_tokens_to_one_expert(few_pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """37 pairs of an expert are three tiles of 16."""
    monkeypatch.setattr(experts, "FEW_PAIRS", few_pairs)
    up, down = random_weight("nvfp4", 5, 16, 32, seed=1), random_weight("fp8", 5, 32, 16, seed=2)
    x, chosen, weights = torch.randn(37, 32), torch.full((37, 1), 3), torch.rand(37, 1)
    y = routed_experts(x, chosen, weights, up, down)
    assert error(y, reference(x, chosen, weights, up, down)) < 3e-6


@pytest.mark.parametrize("tokens", [1, 4])
def test_experts_that_nobody_chose_are_not_read(tokens: int) -> None:
    up, down = random_weight("bf16", 4, 16, 32, seed=1), random_weight("bf16", 4, 32, 16, seed=2)
    up.data[1:3] = float("nan")
    down.data[1:3] = float("nan")
    x, chosen, weights = torch.randn(tokens, 32), torch.tensor([[0, 3]]).repeat(tokens, 1), torch.rand(tokens, 2)
    y = routed_experts(x, chosen, weights, up, down)
    assert error(y, reference(x, chosen, weights, up, down)) < 3e-6


def test_bfloat16() -> None:
    up, down = random_weight("nvfp4", 4, 32, 48, seed=1), random_weight("nvfp4", 4, 48, 32, seed=2)
    for tokens in (1, 3):
        x, chosen, weights = torch.randn(tokens, 48).bfloat16(), distinct(tokens, 4, 2), torch.rand(tokens, 2)
        y = routed_experts(x, chosen, weights, up, down)
        assert y.dtype == torch.bfloat16
        assert error(y, reference(x, chosen, weights, up, down)) < 1e-2


def test_tiles_of_sorted_pairs() -> None:
    """Each pair is in one tile, of its expert; tiles that remain are nobody's."""
    chosen = torch.randint(0, 5, (31, 2))
    order, tile_expert, tile_first, ends = experts.sorted_tiles(chosen, 7, 8)
    found: list[int] = []
    for expert, first in zip(tile_expert.tolist(), tile_first.tolist(), strict=True):
        if expert < 7:
            pairs = order[first : min(first + 8, int(ends[expert]))]
            assert bool((chosen.flatten()[pairs] == expert).all()) and len(pairs)
            found += pairs.tolist()
    assert sorted(found) == list(range(62))


def test_inputs_that_fill_no_word() -> None:
    up, down = random_weight("fp8", 2, 6, 8), random_weight("fp8", 2, 8, 6)
    with pytest.raises(ValueError, match="6 inputs of fp8 experts are no multiple of 4"):
        routed_experts(torch.randn(1, 8), torch.tensor([[0]]), torch.ones(1, 1), up, down)
