"""Every reader against the corpus that fuzzing keeps, and damaged copies of it: a located diagnostic, or read."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.file_readers import CORPUS, READERS, read
from support.mutations import damaged

BOUNDED, MANY = 150, 4200
"""Damaged texts a reader; `MANY` of each are 50,000 over all."""


def inputs(name: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]


def test_every_reader_has_a_corpus() -> None:
    assert {path.name for path in CORPUS.iterdir()} == set(READERS)
    assert sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()) < 1 << 20


@pytest.mark.parametrize("name", READERS)
def test_the_corpus(name: str, tmp_path: Path) -> None:
    for path in sorted((CORPUS / name).iterdir()):
        refused = read(name, tmp_path, path.read_bytes())
        if path.stem == "good" and name != "index":  # which names a file that is not there
            assert not refused, path


@pytest.mark.parametrize("name", READERS)
def test_damaged_copies(name: str, tmp_path: Path) -> None:
    (good,) = (CORPUS / name).glob("good.*")
    for text in damaged(good.read_bytes(), BOUNDED, seed=5):
        read(name, tmp_path, text)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_many_damaged_copies(name: str, tmp_path: Path) -> None:
    good = inputs(name)
    for seed, text in enumerate(good):
        for broken in damaged(text, MANY // len(good) + 1, seed):
            read(name, tmp_path, broken)
