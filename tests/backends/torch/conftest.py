"""What the tests of train.py share as fixtures: a program of a model of bytes, imported, and a text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from .generated import imported, tiny_spec, write_generated
from .training_program import TEXT


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Import the generated training program of a small model of bytes."""
    spec = tiny_spec("ME*", mtp=None)
    folder = tmp_path_factory.mktemp("train")
    write_generated(replace(spec, model=replace(spec.model, vocab_size=256)), folder)
    with imported(folder) as modules:
        yield modules


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_bytes(TEXT)
    return path
