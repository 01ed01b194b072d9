"""What train.py shows while it runs: lines, a terminal, TensorBoard."""

from __future__ import annotations

import io
import json
import sys
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
