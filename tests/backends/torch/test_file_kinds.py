"""What files are by their first bytes and names, and what `train.py` says to those that are no data."""

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
from types import SimpleNamespace
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


def find(train: Any, path: Path, **settings: Any) -> Any:
    """Return the files that a path names."""
    return train.file_kinds.find(path, train.settings.Settings(data=str(path), out="o", steps=1, **settings))


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
    # By their formats' definitions:
    "a Parquet file": lambda path: path.write_bytes(b"PAR1..."),
    "an Arrow file": lambda path: path.write_bytes(b"ARROW1.."),
    "a GGUF file": lambda path: path.write_bytes(b"GGUF\3\0\0\0"),
    "an HDF5 file": lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n\0"),
    "an Avro file": lambda path: path.write_bytes(b"Obj\1..."),
    "a PDF file": lambda path: path.write_bytes(b"%PDF-1.7\n"),
    "a PNG image": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n\0"),
    "a JPEG image": lambda path: path.write_bytes(b"\xff\xd8\xff\xe0"),
    "a program": lambda path: path.write_bytes(b"\x7fELF\2\1\1"),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_what_is_no_text_is_told_by_what_others_wrote(train: Any, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "data.txt"
    WRITERS[kind](path)
    with pytest.raises(train.settings.TrainError, match=f"is {kind}, and no text"):
        find(train, path)


@pytest.mark.parametrize(("at", "refused"), [(0, True), (4095, True), (4096, False)])
def test_zeros_in_the_first_bytes(train: Any, tmp_path: Path, at: int, refused: bool) -> None:
    """Text has none; of a long file the first 4,096 bytes are looked at."""
    path = tmp_path / "text"
    path.write_bytes(b"a" * at + b"\0" + b"a" * 99)
    if not refused:
        assert find(train, path, tokenizer="t").kind == "text"
        return
    with pytest.raises(train.settings.TrainError, match="has bytes of 0, and is no text"):
        find(train, path, tokenizer="t")


@pytest.mark.parametrize("vocabulary", [255, 256, 257])
@pytest.mark.parametrize("tokenizer", ["", "folder"])
@pytest.mark.parametrize("name", ["text", "table.csv", "lines.jsonl"])
@pytest.mark.parametrize("asked", ["auto", "bytes"])
def test_what_needs_a_tokenizer(
    train: Any, tmp_path: Path, vocabulary: int, tokenizer: str, name: str, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a vocabulary of 256 text is bytes, unless there is one; fewer tokens are none of bytes."""
    monkeypatch.setattr(train.file_kinds, "Config", lambda: SimpleNamespace(vocab_size=vocabulary))
    path = tmp_path / name
    path.write_text("a,b\n")
    bytewise = vocabulary == 256 and not tokenizer
    kind, told = "bytes" if asked == "bytes" or (name == "text" and bytewise) else "text", ""
    if asked == "bytes":
        told = "is read as bytes, and the model has a vocabulary of 255" if vocabulary < 256 else ""
    elif name == "lines.jsonl":
        kind = "jsonl"
    elif name == "table.csv":
        kind, told = ("bytes", "") if bytewise else ("", "is a table, and no text: make it Parquet or JSON lines")
    if asked == "auto" and not told and not tokenizer and vocabulary != 256:
        told = f"and the model's {vocabulary} tokens are a tokenizer's: give --tokenizer DIR, its folder"
        told += ", or --data-format bytes" if vocabulary > 256 else ""
    if not told:
        assert find(train, path, tokenizer=tokenizer, data_format=asked).kind == kind
        return
    with pytest.raises(train.settings.TrainError) as error:
        find(train, path, tokenizer=tokenizer, data_format=asked)
    assert told in str(error.value)
    assert ("--data-format bytes" in str(error.value)) == told.endswith("bytes")


def test_files_of_a_folder(train: Any, tmp_path: Path) -> None:
    """Of one kind, in the order of their paths, without hidden ones; the others are counted."""
    for name in ("b.jsonl", "a/z.ndjson", ".hidden.jsonl", ".git/c.jsonl", "readme", "about.json", "z.jsonl.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    found = find(train, tmp_path, tokenizer="t")
    names = [str(file.relative_to(tmp_path)) for file in found.files]
    assert (found.kind, names, found.left_out) == ("jsonl", ["a/z.ndjson", "about.json", "b.jsonl", "z.jsonl.gz"], 1)
    assert find(train, tmp_path, data_format="bytes").left_out == 0
    (tmp_path / "ids.bin").write_bytes(bytes(8))
    found = find(train, tmp_path)  # token ids need no asking
    assert (found.kind, [file.name for file in found.files], found.left_out) == ("tokens", ["ids.bin"], 5)


def test_an_index_is_read_with_its_data(train: Any, tmp_path: Path) -> None:
    """And without it by itself, which says what is missing."""
    for name in ("a.bin", "a.idx", "b.idx"):
        (tmp_path / name).write_bytes(bytes(8))
    assert [file.name for file in find(train, tmp_path).files] == ["a.bin", "b.idx"]
    assert find(train, tmp_path / "a").files == [tmp_path / "a.bin"]
