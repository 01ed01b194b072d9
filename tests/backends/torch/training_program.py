"""What tests of train.py share: a text, and the command line, run in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

TEXT = b"a small text, again and again; " * 40


def arguments(data: Path, out: Path, *more: str) -> list[str]:
    """Return the options of a run of two steps, each of which is saved."""
    given = ["--data", str(data), "--out", str(out), "--steps", "2", "--batch-size", "2", "--seq-len", "16"]
    return [*given, "--save-every", "1", "--val-every", "0", *more]


def opened(train: Any, data: Path) -> Any:
    """Return the tokens of --data, with default settings."""
    settings = train.settings.parse_settings("", arguments(data, data.parent / "out"))
    return train.sources.open_tokens(data, settings)


def failure(train: Any, capsys: pytest.CaptureFixture[str], code: int, *given: str) -> str:
    """Run the command line, which must fail with `code`, and return its one line of error."""
    capsys.readouterr()
    assert train.train.main(given) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0].removeprefix("error: ")
