"""The routers' balance: the load, the bias without an auxiliary loss, and the sequence-level loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from .generated import generate, tiny_spec

IDS = torch.randint(97, (3, 21), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def model(tmp_path: Path) -> Any:
    torch.manual_seed(0)
    return generate(tiny_spec("MEE"), tmp_path).Model()


def test_load_counts_every_choice(model: Any) -> None:
    """Each token chooses top_k experts, in each of two accumulated batches; MTP runs at depth 1 and 2."""
    for _ in range(2):
        model(IDS, IDS)
    assert [router.load.sum().item() for router in model.routers()] == [
        2 * 3 * 21 * 3,
        2 * 3 * 21 * 3,
        2 * 3 * (20 + 19) * 3,
    ]


def test_balance_loss_by_its_equation(model: Any) -> None:
    """DeepSeek-V3, equations 17 to 20, in loops over sequences, tokens and experts."""
    router = model.routers()[0]
    x = torch.randn(2 * 7, 64)
    with torch.no_grad():
        router.e_score_correction_bias.uniform_(-0.3, 0.3)
    experts, _ = router(x, 2)
    (got,) = router.balance_losses
    scores = (x @ router.weight.T).sigmoid()
    losses = []
    for tokens in (range(7), range(7, 14)):
        loss = 0.0
        for e in range(8):
            f = 8 / (3 * 7) * sum(e in experts[t].tolist() for t in tokens)
            loss += f * sum((scores[t, e] / scores[t].sum()).item() for t in tokens) / 7
        losses.append(loss)
    assert got.item() == pytest.approx(sum(losses) / 2, rel=1e-5)


def test_balance_loss_is_one_where_the_load_is_even(model: Any) -> None:
    router = model.routers()[0]
    router.observe(torch.full((1, 8, 8), 0.5), torch.stack([torch.arange(8).roll(-k) for k in range(3)], 1))
    assert router.balance_losses[0].item() == pytest.approx(1.0)


def test_output_sums_the_routers(model: Any) -> None:
    out = model(IDS, IDS)
    kept = [loss for router in model.routers() for loss in router.balance_losses]
    assert len(kept) == 2 + 2  # two blocks, and the MTP block at two depths
    torch.testing.assert_close(out.balance_loss, sum(kept))
    out.balance_loss.backward()
    assert all(router.weight.grad.abs().sum() > 0 for router in model.routers())


def test_only_training_is_observed(model: Any) -> None:
    with torch.no_grad():
        assert model(IDS, IDS).balance_loss is None
    model.step(IDS, model.allocate_state(3, 21))
    loss = model(IDS, IDS).loss
    for router in model.routers():
        router.load.zero_()
    out = model.eval()(IDS, IDS)
    assert out.balance_loss is None and not any(router.load.any() for router in model.routers())
    torch.testing.assert_close(out.loss, loss)  # the balance loss is no part of it


def test_update_moves_the_bias_towards_idle_experts(model: Any) -> None:
    router = model.routers()[0]
    router.load.copy_(torch.tensor([9, 0, 4, 5, 4, 4, 2, 4]))  # the mean is 4
    router.update_bias(1e-3)
    expected = torch.tensor([-1.0, 1, 0, -1, 0, 0, 1, 0]) * 1e-3
    assert torch.equal(router.e_score_correction_bias, expected)
    assert not router.load.any()
    assert "load" not in " ".join(model.state_dict())


def test_updates_even_the_load(model: Any) -> None:
    """With the weights fixed, the bias alone evens out a skewed router."""
    router = model.routers()[0]
    x = torch.randn(512, 64) + 0.5

    def worst() -> float:
        router.load.zero_()
        router(x)
        return float(router.load.max() / router.load.float().mean())

    before = worst()
    for _ in range(400):
        router(x)
        router.balance_losses.clear()
        router.update_bias(2e-3)
    assert before > 1.6 and worst() < 1.15
