"""Importing generated packages: by any name, several at once, from a folder or from files in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from n3c.backends.torch.emit import emit
from n3c.backends.torch.loading import hidden_states, load_package, write_files

from .generated import SHA256, tiny_spec


def test_from_a_folder_and_from_files(tmp_path: Path) -> None:
    files = emit(tiny_spec("M", mtp=None), SHA256)
    write_files(files, tmp_path)
    whole, package, memory = load_package(tmp_path), load_package(tmp_path / "tiny_test"), load_package(files)
    assert len({whole.__name__, package.__name__, memory.__name__}) == 3
    model = whole.Model()
    whole.save_checkpoint(model, tmp_path / "weights")
    for other in (package, memory):
        copy = other.Model(other.Config())
        other.load_checkpoint(copy, tmp_path / "weights")
        assert all(torch.equal(a, b) for a, b in zip(copy.parameters(), model.parameters(), strict=True))
        assert type(copy) is not type(model)


def test_folders_without_one_package(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds 0 packages"):
        load_package(tmp_path)


def test_what_the_code_raises_is_passed_on() -> None:
    files = emit(tiny_spec("M", mtp=None), SHA256)
    with pytest.raises(ZeroDivisionError):
        load_package(files | {"tiny_test/ssd.py": "1 / 0"})


@pytest.mark.parametrize("pattern", ["M", "ME"])
def test_hidden_states(pattern: str) -> None:
    model = load_package(emit(tiny_spec(pattern, mtp=None), SHA256)).Model()
    assert hidden_states(model.backbone(torch.zeros(2, 5, dtype=torch.int64))).shape == (2, 5, 64)
