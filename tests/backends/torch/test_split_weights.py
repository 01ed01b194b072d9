"""`--numerics bf16-split`: weights that are the upper halves of float32 ones, and steps that wait for nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

SPLIT = ("--numerics", "bf16-split", "--log-every", "3")


def arguments(folder: Path, name: str, *more: str) -> list[str]:
    text = folder / "text"
    text.write_bytes(b"a small text, again and again; " * 40)
    given = ["--data", str(text), "--out", str(folder / name), "--batch-size", "2", "--seq-len", "16", "--steps", "8"]
    return [*given, "--save-every", "4", "--val-every", "4", "--lr", "3e-3", *more]


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text("utf-8").splitlines()]


def test_halves_are_the_whole(train: Any) -> None:
    """The upper half is the nearest bfloat16, and both together are the number, to the bit."""
    exponents = torch.randint(-120, 120, (10_000,))
    value = torch.ldexp(torch.randn(10_000), exponents)
    high, low = train.optimizer.split(value)
    assert torch.equal(train.optimizer.joined(high, low), value)
    error = (high.view(torch.bfloat16).double() - value.double()).abs()
    assert (error <= (value.bfloat16().double() - value.double()).abs()).all()


def test_is_adamw(train: Any) -> None:
    """Of float32 parameters; of bfloat16 ones the sum of the halves differs by the moments' rounding alone."""
    torch.manual_seed(0)
    start = torch.randn(1000)
    options: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}
    exact = torch.nn.Parameter(start.clone())
    whole, half = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.bfloat16())
    theirs = torch.optim.AdamW([exact], weight_decay=0.1, **options)
    ours = train.optimizer.SplitAdamW([{"params": [whole, half], "weight_decay": 0.1}], **options)
    for _ in range(20):
        gradient = torch.randn(1000)
        exact.grad, whole.grad, half.grad = gradient * 0.5, gradient.clone(), gradient.bfloat16()
        ours.factor = torch.tensor(0.5)
        theirs.step()
        ours.step()
    torch.testing.assert_close(whole, exact, atol=1e-6, rtol=1e-6)
    joined = train.optimizer.joined(half.view(torch.int16), ours.state[half]["rest"].view(torch.int16))
    moved, wanted = joined - start.bfloat16(), exact - start
    assert (moved - wanted).norm() <= 0.02 * wanted.norm()
    assert torch.equal(joined.bfloat16(), half)


def test_small_steps_are_not_lost(train: Any) -> None:
    """A thousandth of what a bfloat16 weight can be moved by, 2,000 times."""
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = train.optimizer.SplitAdamW([{"params": [weight]}], lr=4e-6, betas=(0.9, 0.95), eps=1e-8)
    for _ in range(2000):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert (weight - (1 - 2000 * 4e-6)).abs().max() <= 2**-8


def test_trains_as_bf16_does(train: Any, tmp_path: Path) -> None:
    assert train.train.main(arguments(tmp_path, "split", *SPLIT)) == 0
    assert train.train.main(arguments(tmp_path, "autocast", "--numerics", "bf16")) == 0
    ours, theirs = lines(tmp_path, "split"), lines(tmp_path, "autocast")
    assert [line["step"] for line in ours] == list(range(1, 9))
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    for name in ("loss", "grad_norm", "balance_loss"):
        assert [line[name] for line in ours] == pytest.approx([line[name] for line in theirs], rel=2**-5)


def test_what_is_bfloat16(train: Any, tmp_path: Path) -> None:
    settings = train.settings.parse_settings("", arguments(tmp_path, "out", *SPLIT))
    model = train.trainer.Trainer(settings, train.world.World(0, 1, torch.device("cpu"))).model
    narrow = {
        name.rpartition(".")[0].rpartition(".")[2] for name, p in model.named_parameters() if p.dtype == torch.bfloat16
    }
    wide = {name.split(".")[-1] for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert narrow >= {"embeddings", "lm_head", "in_proj", "out_proj", "experts", "q_proj"} and "gate" not in narrow
    assert wide >= {"A_log", "D", "dt_bias"}


def test_resume_to_the_same_bits(train: Any, tmp_path: Path) -> None:
    assert train.train.main(arguments(tmp_path, "whole", *SPLIT)) == 0
    half = arguments(tmp_path, "halves", *SPLIT)
    settings = train.settings.parse_settings("", half)
    trainer = train.trainer.Trainer(settings, train.world.World(0, 1, torch.device("cpu")))
    trainer.model.train()
    for _ in range(4):
        trainer.train_step()
    trainer.save()
    trainer.store.finish()
    assert train.train.main([*half, "--resume"]) == 0
    for line, other in zip(lines(tmp_path, "halves"), lines(tmp_path, "whole")[4:], strict=True):
        assert (line["loss"], line["grad_norm"]) == (other["loss"], other["grad_norm"])


def test_numbers_that_are_not_finite(
    train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are found when metrics are read; until then no weight moves."""
    settings = train.settings.parse_settings("", arguments(tmp_path, "out", *SPLIT))
    trainer = train.trainer.Trainer(settings, train.world.World(0, 1, torch.device("cpu")))
    trainer.model.train()
    trainer.train_step()
    norm = trainer.model.backbone.norm_f.weight
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}

    def broken(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * torch.nan

    hook = norm.register_hook(broken)
    trainer.train_step()
    hook.remove()
    trainer.train_step()
    assert all(torch.equal(before[name], p) for name, p in trainer.model.named_parameters())
    with pytest.raises(train.settings.TrainError, match=r"^step 2: loss .*, norm of the gradient nan: ") as caught:
        trainer.read()
    assert caught.value.code == 5


def test_defaults(train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 on a CPU; on a GPU bf16-split, but bf16 where gradients of parts or processes are summed."""

    def numerics(*more: str) -> str:
        return str(train.settings.parse_settings("", arguments(tmp_path, "out", *more)).numerics)

    monkeypatch.delenv("RANK", raising=False)
    assert numerics() == "float32"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert numerics() == "bf16-split" and numerics("--accumulation", "2") == "bf16"
    assert numerics("--numerics", "float32") == "float32"
    monkeypatch.setenv("RANK", "0")
    assert numerics() == "bf16"
    with pytest.raises(train.settings.TrainError, match="is for one process"):
        numerics(*SPLIT)
