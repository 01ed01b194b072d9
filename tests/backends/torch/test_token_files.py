"""Files of tokens at the bounds of what `train.py` reads."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import sqlite3
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.orc as orc
import pytest
import torch
from safetensors.torch import save

from .data_files import program


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with program(tmp_path_factory.mktemp("train")) as modules:
        yield modules


@pytest.mark.parametrize(("length", "read"), [(10_000, True), (10_001, False)])
def test_the_longest_header_of_npy(train: Any, tmp_path: Path, length: int, read: bool) -> None:
    """As numpy has it: 10,000 bytes, of which most may be spaces."""
    header = b"{'descr': '<u2', 'fortran_order': False, 'shape': (3,)}".ljust(length)
    path = tmp_path / "tokens.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00" + length.to_bytes(2, "little") + header + b"\1\0\2\0\3\0")
    if read:
        assert train.token_files.npy_header(path)[0] == 10 + length
        return
    with pytest.raises(train.settings.TrainError, match=r"is no \.npy file of .*, \[T\] or rows \[N, T\]$"):
        train.token_files.npy_header(path)


def sqlite(path: Path) -> None:
    database = sqlite3.connect(path)
    database.execute("create table t (x)")
    database.close()


def tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("a"), io.BytesIO())


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", "b")


WRITERS: dict[str, Callable[[Path], object]] = {
    "a gzip archive": lambda path: path.write_bytes(gzip.compress(b"text")),
    "a bzip2 archive": lambda path: path.write_bytes(bz2.compress(b"text")),
    "an xz archive": lambda path: path.write_bytes(lzma.compress(b"text")),
    "a zstd archive": lambda path: path.write_bytes(pa.compress(b"text", codec="zstd", asbytes=True)),
    "a zip archive": zipped,
    "a tar archive": tar,
    "an SQLite file": sqlite,
    "a safetensors file": lambda path: path.write_bytes(save({"x": torch.ones(3)})),
    "an ORC file": lambda path: orc.write_table(pa.table({"x": [1]}), path),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_what_is_no_text_is_told_by_what_others_wrote(train: Any, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "data.txt"
    WRITERS[kind](path)
    settings = train.settings.Settings(data=str(path), out="o", steps=1)
    with pytest.raises(train.settings.TrainError, match=f"is {kind}, and no text"):
        train.file_kinds.find(path, settings)


@pytest.mark.parametrize("wrong", range(10))
def test_tokens_beyond_the_vocabulary(train: Any, wrong: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 10 in two files the first 8 are checked, 4 at a time, when they are opened; the others where they are read."""
    monkeypatch.setattr(train.tokens, "CHECKED", 5)
    monkeypatch.setattr(train.tokens, "PIECE", 4)
    ids = torch.zeros(10, dtype=torch.int32)
    ids[wrong] = 512
    said = rf"^a holds token 512, and the vocabulary has 512 \(the first wrong one is token {wrong}\)$"

    def opened(vocabulary: int, count: int = 10) -> Any:
        return train.tokens.Tokens(Path("a"), vocabulary, [ids[:3], ids[3:count]])

    for count in range(wrong + 1, 11):
        assert opened(513, count).read(0, count).tolist() == ids[:count].tolist()
    if wrong < 8:
        with pytest.raises(train.settings.TrainError, match=said):
            opened(512)
        return
    tokens = opened(512)
    assert tokens.window(wrong - 4, 4).ids.tolist() == [0] * 4
    with pytest.raises(train.settings.TrainError, match=said):
        tokens.window(6, 4)


@pytest.mark.parametrize("start", range(9))
@pytest.mark.parametrize("length", range(1, 5))
def test_the_documents_of_a_window(train: Any, start: int, length: int) -> None:
    """Tokens of one document, and no others, have one number."""
    of_token = [0, 0, 0, 1, 2, 2, 3, 3, 3, 3, 4, 5, 5]
    ends = torch.tensor([3, 4, 6, 10, 11, 13])
    tokens = train.tokens.Tokens(Path("a"), 512, [torch.zeros(13, dtype=torch.int32)], ends)
    numbers = tokens.documents(start, length)
    expected = torch.tensor(of_token[start : start + length])
    assert torch.equal(numbers[:, None] == numbers, expected[:, None] == expected)
