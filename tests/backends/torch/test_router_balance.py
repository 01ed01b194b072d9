"""The routers' balance: the load, the bias without an auxiliary loss, and the sequence-level loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .generated import generate, tiny_spec

IDS = torch.randint(97, (3, 21), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def package() -> Any:
    return generate(tiny_spec("MEE"))


@pytest.fixture
def model(package: Any) -> Any:
    torch.manual_seed(0)
    return package.Model()


def test_load_counts_every_choice(model: Any) -> None:
    """Each token chooses top_k experts; MTP runs at depth 1 and 2."""
    out = model(IDS, IDS)
    assert out.tokens_per_expert.shape == (3, 8) and out.tokens_per_expert.dtype == torch.int64
    assert out.tokens_per_expert.sum(1).tolist() == [3 * 21 * 3, 3 * 21 * 3, 3 * (20 + 19) * 3]
    assert model(IDS[:, :2], IDS[:, :2]).tokens_per_expert.sum(1).tolist() == [3 * 2 * 3, 3 * 2 * 3, 3 * 3]


def test_load_is_that_of_the_chosen(model: Any) -> None:
    router = model.routers()[0]
    experts, _, statistics = router(torch.randn(3, 21, 64))
    assert torch.equal(statistics.tokens_per_expert, torch.bincount(experts.flatten(), minlength=8))


def test_balance_loss_by_its_equation(model: Any) -> None:
    """DeepSeek-V3, equations 17 to 20, in loops over sequences, tokens and experts."""
    router = model.routers()[0]
    x = torch.randn(2, 7, 64)
    with torch.no_grad():
        router.e_score_correction_bias.uniform_(-0.3, 0.3)
    experts, _, statistics = router(x)
    scores = (x @ router.weight.T).sigmoid()
    losses = []
    for b in range(2):
        loss = 0.0
        for e in range(8):
            f = 8 / (3 * 7) * sum(e in experts[b, t].tolist() for t in range(7))
            loss += f * sum((scores[b, t, e] / scores[b, t].sum()).item() for t in range(7)) / 7
        losses.append(loss)
    assert statistics.balance_loss.item() == pytest.approx(sum(losses) / 2, rel=1e-5)


def test_balance_loss_is_one_where_the_load_is_even(package: Any) -> None:
    experts = torch.stack([torch.arange(8).roll(-k) for k in range(3)], 1)[None]
    statistics = package.balance.router_statistics(torch.full((1, 8, 8), 0.5), experts)
    assert statistics.balance_loss.item() == pytest.approx(1.0)
    assert statistics.tokens_per_expert.tolist() == [3] * 8


def test_output_sums_the_routers(model: Any) -> None:
    seen: list[torch.Tensor] = []

    def note(_: Any, __: Any, out: Any) -> None:
        seen.append(out[2].balance_loss)

    for router in model.routers():
        router.register_forward_hook(note)
    out = model(IDS, IDS)
    assert len(seen) == 2 + 2  # two blocks, and the MTP block at two depths
    torch.testing.assert_close(out.balance_loss, torch.stack(seen).sum())
    out.balance_loss.backward()
    assert all(router.weight.grad.abs().sum() > 0 for router in model.routers())


def test_only_training_has_statistics(model: Any) -> None:
    with torch.no_grad():
        assert model(IDS, IDS).balance_loss is None
    loss = model(IDS, IDS).loss
    out = model.eval()(IDS, IDS)
    assert out.balance_loss is None and out.tokens_per_expert is None
    torch.testing.assert_close(out.loss, loss)  # the balance loss is no part of it


def test_update_moves_the_bias_towards_idle_experts(model: Any) -> None:
    router = model.routers()[0]
    router.update_bias(torch.tensor([9, 0, 4, 5, 4, 4, 2, 4]), 1e-3)  # the mean is 4
    expected = torch.tensor([-1.0, 1, 0, -1, 0, 0, 1, 0]) * 1e-3
    assert torch.equal(router.e_score_correction_bias, expected)


def test_updates_even_the_load(model: Any) -> None:
    """With the weights fixed, the bias alone evens out a skewed router."""
    router = model.routers()[0]
    x = torch.randn(1, 512, 64) + 0.5

    def load() -> torch.Tensor:
        counts: torch.Tensor = router(x)[2].tokens_per_expert
        return counts

    def worst() -> float:
        return float(load().max() / load().float().mean())

    before = worst()
    for _ in range(400):
        router.update_bias(load(), 2e-3)
    assert before > 1.6 and worst() < 1.15
