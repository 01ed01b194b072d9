"""The callback of transformers' trainers that keeps the load of the experts even, called as these do."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from n3c.backends.torch.loading import load_package

from .generated import tiny_spec, write_generated

IDS = torch.randint(97, (3, 21), generator=torch.Generator().manual_seed(5))
ARGUMENTS = SimpleNamespace(fp16=False, gradient_accumulation_steps=2)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("callbacks")
    write_generated(tiny_spec("MEE"), folder)
    return load_package(folder)


@pytest.fixture(scope="module")
def callbacks(package: Any) -> Any:
    return importlib.import_module(f"{package.__name__}.callbacks")


@pytest.fixture
def model(package: Any) -> Any:
    torch.manual_seed(0)
    return package.Model()


def test_the_bias_moves_after_each_step_by_what_was_chosen_in_training(callbacks: Any, model: Any) -> None:
    """By two batches of one step; evaluation in between counts nothing."""
    callback = callbacks.RouterBalance(bias_rate=0.25, balance_factor=0.5)
    callback.on_train_begin(ARGUMENTS, None, None, model=model)
    assert [router.balance_factor for router in model.routers()] == [0.25] * 3  # of each batch of the step
    load = model(IDS, IDS).tokens_per_expert + model(IDS.flip(1), IDS.flip(1)).tokens_per_expert
    model.eval()(IDS)
    before = [router.e_score_correction_bias.clone() for router in model.routers()]
    callback.on_optimizer_step(ARGUMENTS, None, None)
    after = [router.e_score_correction_bias.clone() for router in model.routers()]
    for old, new, chosen in zip(before, after, load.float(), strict=True):
        assert torch.equal(new - old, 0.25 * (chosen.mean() - chosen).sign())
    callback.on_optimizer_step(ARGUMENTS, None, None)  # nothing was chosen since
    assert all(torch.equal(a, router.e_score_correction_bias) for a, router in zip(after, model.routers(), strict=True))


def test_after_training_routers_are_as_before(callbacks: Any, model: Any) -> None:
    callback = callbacks.RouterBalance()
    callback.on_train_begin(ARGUMENTS, None, None, model=model)
    assert all(0 < router.balance_factor == callback.balance_factor / 2 for router in model.routers())
    callback.on_train_end(ARGUMENTS, None, None, model=model)
    model(IDS, IDS)
    assert not callback.loads and not callback.hooks
    assert all(router.balance_factor == 0 for router in model.routers())


def test_loads_are_those_of_all_processes(callbacks: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the others chose the last expert alone."""
    callback = callbacks.RouterBalance(bias_rate=1.0)
    callback.on_train_begin(ARGUMENTS, None, None, model=model)

    def all_reduce(load: Tensor) -> None:
        load[-1] += 10_000

    monkeypatch.setattr(callbacks, "dist", SimpleNamespace(is_initialized=lambda: True, all_reduce=all_reduce))
    model(IDS, IDS)
    callback.on_optimizer_step(ARGUMENTS, None, None)
    for router in model.routers():
        assert router.e_score_correction_bias.tolist() == [1.0] * 7 + [-1.0]


def test_fp16_has_no_balance_loss(callbacks: Any, model: Any) -> None:
    """Trainers scale the loss that they know of."""
    arguments = SimpleNamespace(fp16=True, gradient_accumulation_steps=1)
    with pytest.raises(ValueError, match="balance_factor=0"):
        callbacks.RouterBalance().on_train_begin(arguments, None, None, model=model)
    callback = callbacks.RouterBalance(balance_factor=0)
    callback.on_train_begin(arguments, None, None, model=model)
    assert len(callback.hooks) == 3
