"""Golden files: expected text under tests/golden, rewritten where N3C_UPDATE_GOLDEN is set."""

from __future__ import annotations

import os
from pathlib import Path

GOLDEN = Path(__file__).parents[1] / "golden"


def assert_golden(name: str, text: str) -> None:
    """Compare `text` with the golden file `name`; `make golden` rewrites the files."""
    path = GOLDEN / name
    if os.environ.get("N3C_UPDATE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.exists(), f"no golden file {path}: run `make golden` and review it"
    assert text == path.read_text(encoding="utf-8"), f"{path} differs: run `make golden` and review the diff"
