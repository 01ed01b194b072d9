"""What train.py shows while it runs: lines, a terminal, TensorBoard."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from .training_program import arguments, failure


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("rich", [True, False])
def test_terminal(train: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rich: bool) -> None:
    """A progress line by rich where it is installed; else plain lines, as in a file."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "200")
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.progress", None)
    assert train.train.main(arguments(text, tmp_path / "out", "--peak-tflops", "0.001")) == 0
    shown = terminal.getvalue()
    assert ("2/2" in shown) == rich and ("2 of 2" in shown) == (not rich)
    assert all(name in shown for name in ("loss", "expert load", "tokens/s", "MFU"))
    line = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["mfu"] == pytest.approx(line["flops_per_second"] / 1e9, abs=1e-4)


def test_the_speed_of_a_step(train: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """4 x 15 tokens in 3 s over two processes; a token attends to 8 on average, and is trained in three passes."""
    monkeypatch.setattr(train.metrics, "FLOPS_PER_TOKEN", 1000)
    monkeypatch.setattr(train.metrics, "FLOPS_PER_TOKEN_OF_CONTEXT", 10)
    given = arguments(text, tmp_path, "--batch-size", "4", "--seq-len", "15", "--peak-tflops", "0.00000035")
    settings, world = train.settings.parse_settings("", given), SimpleNamespace(rank=1, size=2)
    found = train.metrics.Metrics(settings, world, 0).speed(3.0)
    assert found == {"tokens_per_second": 20.0, "flops_per_second": 64_800, "mfu": 0.0926}
    found = train.metrics.Metrics(settings, world, 0).speed(7.0)  # to a tenth, a whole one, 4 digits
    assert found == {"tokens_per_second": 8.6, "flops_per_second": 27_771, "mfu": 0.0397}
    settings = replace(settings, seq_len=16, peak_tflops=0.0)
    world = SimpleNamespace(rank=1, size=2, device=SimpleNamespace(type="cpu"))  # of which no peak is known
    found = train.metrics.Metrics(settings, world, 0).speed(64.0)
    assert found == {"tokens_per_second": 1.0, "flops_per_second": 3 * 1085}


def test_what_is_done_again_is_told_once(train: Any, text: Path, tmp_path: Path) -> None:
    """Lines of steps after the checkpoint go, and those that were cut off; another process touches nothing."""
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step}) for step in range(1, 5)]
    damaged = ['{"step": 2, "lo', "[]", '{"loss": 1}', '{"step": null}']
    path.write_text("\n".join([*lines[:2], *damaged, *lines[2:]]))
    settings = train.settings.parse_settings("", arguments(text, tmp_path))
    device = SimpleNamespace(type="cpu")
    for rank, done, kept in ((1, 0, 8), (0, 3, 3), (0, 2, 2), (0, 0, 0)):
        train.metrics.Metrics(settings, SimpleNamespace(rank=rank, size=2, device=device), done)
        assert len(path.read_text().splitlines()) == kept
    metrics = train.metrics.Metrics(settings, SimpleNamespace(rank=1, size=2, device=device), 0)
    metrics.write({"step": 1})
    assert path.read_text() == ""


def test_the_line_of_a_step(train: Any) -> None:
    metrics = {"step": 3, "lr": 0.001, "loss": 1.23456, "val_loss": 2.0, "expert_load": [1.0, 2.345]}
    shown = train.metrics.shown(metrics | {"tokens_per_second": 12345.6, "mfu": 0.1234})
    assert shown == "loss 1.235  val_loss 2  lr 0.001  expert load 2.35  12,346 tokens/s  MFU 12.3%"
    assert train.metrics.numbers_of(metrics) == {
        "lr": 0.001, "loss": 1.23456, "val_loss": 2.0, "expert_load/0": 1.0, "expert_load/1": 2.345
    }  # fmt: skip


def test_which_steps_are_shown(train: Any, text: Path, tmp_path: Path) -> None:
    """The first, the last, every third, and one with a validation; the file has them all."""
    shown: list[str] = []
    world = SimpleNamespace(rank=0, size=1, device=SimpleNamespace(type="cpu"), say=shown.append)
    settings = train.settings.parse_settings("", arguments(text, tmp_path, "--log-every", "3", "--steps", "8"))
    metrics = train.metrics.Metrics(settings, world, 0)
    for step in range(1, 9):
        metrics.write({"step": step, "tokens_per_second": 1.0} | ({"val_loss": 0.5} if step == 5 else {}))
    assert [int(line.split()[0]) for line in shown] == [1, 3, 5, 6, 8]
    assert shown[2].split("  ")[-2:] == ["val_loss 0.5", "1 tokens/s"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 8


def test_tensorboard(
    train: Any, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every number of a step under its name; an error where TensorBoard is asked for and not installed."""
    found: list[tuple[str, float, int]] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            assert (folder, purge_step) == (str(tmp_path / "out" / "tensorboard"), 1)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            found.append((name, value, step))

        def close(self) -> None:
            found.append(("closed", 0.0, 0))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    assert train.train.main(arguments(text, tmp_path / "out", "--tensorboard")) == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert {(name, line["step"]) for line in lines for name in ("loss", "lr", "tokens_per_second")} <= {
        (name, step) for name, _, step in found
    }
    assert found[-1][0] == "closed"
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    said = failure(train, capsys, 2, *arguments(text, tmp_path / "other", "--tensorboard"))
    assert said.startswith("--tensorboard needs the package tensorboard")
