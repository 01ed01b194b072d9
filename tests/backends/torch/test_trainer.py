"""A step of train.py in parts: what several processes and parts of a batch compute adds up to the whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from .generated import imported, tiny_spec, write_generated

DEPTH = 2


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Import the program of a small model of bytes with experts and MTP."""
    folder, spec = tmp_path_factory.mktemp("train"), tiny_spec("E*", depth=DEPTH)
    write_generated(replace(spec, model=replace(spec.model, vocab_size=256)), folder)
    np.save(folder / "ids.npy", np.random.default_rng(0).integers(0, 256, 1000).astype("<u2"))
    with imported(folder) as modules:
        yield modules


def trainer_of(train: Any, out: Path, *more: str, rank: int = 0, processes: int = 1) -> Any:
    """Return a trainer of steps of 4 sequences of 16 tokens, in one of several processes.

    What a process sums it is told as if each other had the same; its own values are in `summed`.
    """
    summed: list[torch.Tensor] = []

    class Process(train.world.World):  # type: ignore[misc]
        data_size, data_rank = processes, rank

        def sum(self, values: torch.Tensor) -> torch.Tensor:
            summed.append(values.clone())
            return values * processes

    data = Path(train.train.__file__).with_name("ids.npy")
    given = ["--data", str(data), "--out", str(out), "--steps", "2", "--batch-size", "4", "--seq-len", "16"]
    settings = train.settings.parse_settings("", [*given, "--val-every", "0", "--balance", "0.5", *more])
    trainer = train.trainer.Trainer(settings, Process(rank, processes, torch.device("cpu")))
    trainer.summed = summed
    trainer.model.train()
    return trainer


def gradients(trainer: Any) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Return losses, loads and gradients of the second step."""
    sums, load = trainer.gradients(1)
    return sums, load, {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("processes", "parts"), [(1, 2), (2, 1), (2, 2), (1, 4)])
def test_parts_of_a_step_add_up_to_it(train: Any, tmp_path: Path, processes: int, parts: int) -> None:
    """Losses, loads of the experts and gradients, those of the balance of the experts among them."""
    whole, whole_load, expected = gradients(trainer_of(train, tmp_path / "whole"))
    assert whole.dtype == torch.float64 and float(whole[2]) > 0.9
    given = ["--accumulation", str(parts)]
    ranks = [trainer_of(train, tmp_path / f"{n}", *given, rank=n, processes=processes) for n in range(processes)]
    found = [gradients(trainer) for trainer in ranks]
    torch.testing.assert_close(torch.stack([sums for sums, _, _ in found]).sum(0), whole, atol=1e-5, rtol=0)
    assert torch.equal(torch.stack([load for _, load, _ in found]).sum(0), whole_load)
    for name, gradient in expected.items():
        torch.testing.assert_close(sum(g[name] for _, _, g in found), gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_each_process_has_sequences_of_its_own(train: Any, tmp_path: Path) -> None:
    """All of those of a step, once; the next step has the next."""
    whole = trainer_of(train, tmp_path / "whole")
    ranks = [trainer_of(train, tmp_path / f"{n}", "--accumulation", "2", rank=n, processes=2) for n in range(2)]
    for step in (0, 1, 5):
        (batch,) = whole.micro_batches(step)
        assert [row.tolist() for row in batch.ids] == [
            whole.train_data.shuffled(4 * step + n).ids.tolist() for n in range(4)
        ]
        parts = [[part.ids for part in rank.micro_batches(step)] for rank in ranks]
        assert [len(part) for rank in parts for part in rank] == [1] * 4
        assert torch.equal(torch.cat([parts[0][0], parts[1][0], parts[0][1], parts[1][1]]), batch.ids)


@pytest.mark.parametrize(
    ("given", "processes", "message"),
    [
        (["--batch-size", "3"], 2, "--batch-size 3 does not divide into 2 processes x 1 parts"),
        (["--batch-size", "6", "--accumulation", "2"], 2, "--batch-size 6 does not divide into 2 processes x 2 parts"),
        (["--batch-size", "1"], 2, "--batch-size 1 does not divide into 2 processes x 1 parts"),
    ],
)
def test_steps_that_do_not_divide(train: Any, tmp_path: Path, given: list[str], processes: int, message: str) -> None:
    with pytest.raises(train.settings.TrainError, match=message) as error:
        trainer_of(train, tmp_path, *given, processes=processes)
    assert error.value.code == 2


def test_random_numbers_of_a_step(train: Any, tmp_path: Path) -> None:
    """They follow from seed, step and process, of which each has its own; the largest seed is one."""
    trainer, seeds = trainer_of(train, tmp_path), list[int]()
    for seed, rank, step in product((0, 1, 2**33, 2**63 - 1), range(3), (0, 1, 127, 128)):
        trainer.settings = replace(trainer.settings, seed=seed)
        trainer.world = SimpleNamespace(data_rank=rank)
        with pytest.raises(AttributeError, match="data_size"):  # the numbers are drawn after it
            trainer.gradients(step)
        seeds.append(torch.initial_seed())
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize("length", [2, 3, 4, 9])
def test_what_a_sequence_predicts(train: Any, tmp_path: Path, length: int) -> None:
    """One token fewer a step of prediction, to none at last; each has a loss."""
    trainer = trainer_of(train, tmp_path, "--seq-len", str(length))
    (batch,) = trainer.micro_batches(0)
    assert trainer.distillation is trainer.quantized is trainer.average is None  # which nobody has asked for
    expected = [4.0 * (length - ahead) for ahead in range(1, 2 + DEPTH) if length > ahead - 1]
    assert trainer.targets(batch).tolist() == expected
    assert len(trainer.forward(batch).losses) == len(expected)
    sums, _ = trainer.gradients(0)
    assert sums.isfinite().all()


def test_a_batch_with_one_token_to_predict(train: Any, tmp_path: Path) -> None:
    """It has all of the loss; a batch with none has none, and none of a step of nothing is not a number."""
    trainer = trainer_of(train, tmp_path)
    ids = torch.arange(16)[None]
    labels = torch.full_like(ids, -100)
    one = labels.clone()
    one[0, 3] = 3
    batches = [train.data.Batch(ids, given, None) for given in (labels, one)]
    assert trainer.shares_of_loss(batches).tolist() == [[0, 0, 0], [1, 1, 1]]
    assert trainer.shares_of_loss(batches[:1]).tolist() == [[0, 0, 0]]


def test_a_step_waits_for_the_device_unless_the_optimizer_judges_it_there(train: Any, tmp_path: Path) -> None:
    assert trainer_of(train, tmp_path, "--numerics", "bf16-split").waits is False
    assert trainer_of(train, tmp_path / "wide", "--numerics", "float32").waits is True


def test_what_a_step_tells(train: Any, tmp_path: Path) -> None:
    """Loads are to three digits, largest over mean; the numbers of both steps, and nothing twice."""
    trainer = trainer_of(train, tmp_path)
    expected: list[dict[str, Any]] = []
    for step in (0, 1):
        sums, load = trainer.gradients(step)
        norm = train.parallelize.norm_of_gradients(trainer.model.parameters()).item()
        loads = [round(float(row.max() / row.double().mean()), 3) for row in load]
        trainer.optimizer.zero_grad()
        rate = train.optimizer.learning_rate(trainer.settings, step)
        names = {"step": step + 1, "loss": sums[0].item(), "mtp_loss": sums[1].item(), "balance_loss": sums[2].item()}
        expected.append(names | {"expert_load": loads, "lr": rate, "grad_norm": pytest.approx(norm)})
        trainer.train_step()
    assert trainer.read() == expected
    assert trainer.read() == []


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("sequences", [1, 3, 6, 7, 9])
def test_validation_scores_each_sequence_once(train: Any, tmp_path: Path, processes: int, sequences: int) -> None:
    """Evenly chosen ones, whatever process runs them; of 12 at most as many as are asked for."""
    given = ["--val-every", "1", "--val-fraction", "0.2", "--val-sequences", str(sequences)]
    ranks = [trainer_of(train, tmp_path / f"{n}", *given, rank=n, processes=processes) for n in range(processes)]
    windows, parts, found = ranks[0].val_data, list[torch.Tensor](), dict[str, float]()
    assert windows.per_epoch == 12
    for trainer in ranks:
        trainer.summed.clear()
        found = trainer.validate()
        parts += trainer.summed
        assert trainer.model.training
    losses, scored = torch.stack(parts).sum(0)
    model = ranks[0].model.eval()
    rows = torch.stack([windows.read(n * 12 // sequences).ids for n in range(sequences)])
    with torch.no_grad():
        expected = model(rows, rows)
    assert scored.tolist() == [sequences * (16 - ahead) for ahead in range(1, 2 + DEPTH)]
    means = (losses / scored).tolist()
    assert means == pytest.approx([loss.item() for loss in expected.losses], rel=1e-5)
    if processes == 1:
        assert found["val_loss"] == pytest.approx(means[0])
        assert found["val_mtp_loss"] == pytest.approx((means[1] + means[2]) / 2)
        assert "val_bits_per_byte" not in found  # these tokens are no bytes


def test_validation_of_one_token(train: Any, tmp_path: Path) -> None:
    """Its loss is the mean; what predicts nothing adds nothing."""
    given = ["--seq-len", "2", "--val-every", "1", "--val-fraction", "0.2", "--val-sequences", "1"]
    trainer = trainer_of(train, tmp_path, *given)
    found = trainer.validate()
    rows = trainer.val_data.read(0).ids[None]
    with torch.no_grad():
        expected = trainer.model.eval()(rows, rows).losses[0].item()
    assert found == {"val_loss": pytest.approx(expected), "val_mtp_loss": 0}


def test_every_block_is_compiled_by_itself(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []

    def compile_block(function: Any) -> str:
        compiled.append(function)
        return "compiled"

    monkeypatch.setattr(torch, "compile", compile_block)
    model = train.model.Model()
    blocks = [*model.backbone.layers, *model.mtp.layers]
    functions = [block.compute for block in blocks]
    train.trainer.compile_blocks(model)
    assert compiled == functions and all(block.compute == "compiled" for block in blocks)


def test_the_last_checkpoint_of_another_run_is_named(train: Any, tmp_path: Path) -> None:
    """A run of as many steps goes on with none to do, or from the step that it is asked for."""
    trainer = trainer_of(train, tmp_path)
    for _ in range(2):
        trainer.train_step()
        trainer.save()
    trainer.store.finish()
    with pytest.raises(train.settings.TrainError, match="step-000000002 is there: add --resume") as error:
        trainer_of(train, tmp_path)
    assert error.value.code == 6
    assert trainer_of(train, tmp_path, "--resume").step == 2
    assert trainer_of(train, tmp_path, "--resume-step", "1").step == 1
