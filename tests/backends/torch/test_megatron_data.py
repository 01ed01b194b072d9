"""Megatron's .bin and .idx: read by train.py as they are laid out, and as Megatron-core writes them."""

from __future__ import annotations

import importlib
import struct
import sys
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from .data_files import program, settings_of


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with program(tmp_path_factory.mktemp("train")) as modules:
        yield modules


def opened(train: Any, data: Path) -> Any:
    """Return the tokens of --data."""
    return train.sources.open_tokens(data, settings_of(train, data, data.parent / "out"))


def megatron(prefix: Path, documents: list[list[list[int]]], code: int = 8, dtype: str = "<u2") -> None:
    """Write documents of sequences of ids as Megatron-core's IndexedDatasetBuilder does."""
    sequences = [ids for document in documents for ids in document]
    data = [np.array(ids, dtype) for ids in sequences]
    prefix.with_suffix(".bin").write_bytes(b"".join(array.tobytes() for array in data))
    offsets = [0, *accumulate(array.nbytes for array in data)][: len(data)]
    firsts = [0, *accumulate(len(document) for document in documents)]
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sequences), len(firsts))
    arrays = (np.array([*map(len, data)], "<i4"), np.array(offsets, "<i8"), np.array(firsts, "<i8"))
    prefix.with_suffix(".idx").write_bytes(header + b"".join(array.tobytes() for array in arrays))


MEGATRON = [[[1, 2, 3], [4, 5]], [[6]], [[7, 8, 9, 10], [11] * 9]]


@pytest.mark.parametrize(("code", "dtype"), [(1, "<u1"), (8, "<u2"), (4, "<i4"), (5, "<i8")])
def test_megatron(train: Any, tmp_path: Path, code: int, dtype: str) -> None:
    """By the prefix that Megatron takes, either file, or a folder; documents of several sequences."""
    megatron(tmp_path / "one", MEGATRON, code, dtype)
    for name in ("one", "one.bin", "one.idx", "."):
        tokens = opened(train, tmp_path / name)
        assert tokens.read(0, 19).tolist() == [i for document in MEGATRON for ids in document for i in ids]
        assert tokens.ends.tolist() == [5, 6, 19] and "1 file of token ids, 3 documents, 19 tokens" in tokens.opened


def test_megatron_in_several_files(train: Any, tmp_path: Path) -> None:
    megatron(tmp_path / "a", MEGATRON)
    megatron(tmp_path / "b", MEGATRON[:2])
    np.save(tmp_path / "c.npy", np.arange(4))
    tokens = opened(train, tmp_path)
    assert tokens.ends.tolist() == [5, 6, 19, 24, 25, 29]
    window = tokens.window(3, 18)  # from inside the first document into the fourth
    assert window.documents.tolist() == [0, 0, 1, *[2] * 13, 3, 3]
    assert window.labels is window.ids


@pytest.mark.parametrize(
    ("at", "new", "message"),
    [
        (7, b"\x00\x01", "is no index of Megatron's version 1"),
        (9, struct.pack("<Q", 2), "is no index of Megatron's version 1"),
        (17, b"\x07", "has type 7, which is none of tokens"),
        (-8, b"", "is not as long as 5 sequences and 4 bounds"),
        (18, struct.pack("<Q", 1 << 60), "is not as long as 1152921504606846976"),
        (34, struct.pack("<i", -3), "is not the index of one.bin"),
        (34, struct.pack("<i", 4), "is not the index of one.bin"),
        (-8, struct.pack("<q", 99), "is not the index of one.bin"),
        (-16, struct.pack("<qq", -1, 5), "is not the index of one.bin"),
        (-32, struct.pack("<q", 1), "is not the index of one.bin"),
        (54, struct.pack("<q", 2), "is not the index of one.bin"),
    ],
)
def test_damaged_megatron(train: Any, tmp_path: Path, at: int, new: bytes, message: str) -> None:
    """Other bytes at a place of the index, or none from it on, are told."""
    megatron(tmp_path / "one", MEGATRON)
    index = tmp_path / "one.idx"
    old = index.read_bytes()
    at %= len(old)
    index.write_bytes(old[:at] + new + (old[at + len(new) :] if new else b""))
    with pytest.raises(train.settings.TrainError) as error:
        opened(train, tmp_path / "one")
    assert message in str(error.value) and error.value.code == 6


def test_empty_parts_of_megatron(train: Any, tmp_path: Path) -> None:
    """Sequences and documents without a token are in an index, too; one without a bound has none."""
    megatron(tmp_path / "some", [[[]], [[1, 2], []], [], [[3]]])
    tokens = opened(train, tmp_path / "some")
    assert tokens.read(0, 3).tolist() == [1, 2, 3] and tokens.ends.tolist() == [0, 2, 2, 3]
    assert tokens.opened.endswith("4 documents, 3 tokens (uint16, 1 with Megatron's index)")
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 0, 0)
    (tmp_path / "none.idx").write_bytes(header)
    (tmp_path / "none.bin").write_bytes(b"")
    with pytest.raises(train.settings.TrainError, match=r"is not the index of none\.bin"):
        opened(train, tmp_path / "none")


@pytest.mark.oracles
@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_what_megatron_writes(train: Any, tmp_path: Path, dtype: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own builder's files are read, those of these tests are the same bytes, and its own reader agrees."""
    folder = Path(sys.prefix) / "megatron"
    assert folder.is_dir(), "`make test-oracles` unpacks Megatron-core there"
    monkeypatch.syspath_prepend(str(folder))
    core = importlib.import_module("megatron.core.datasets.indexed_dataset")
    builder = core.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in MEGATRON:
        for ids in document:
            builder.add_item(torch.tensor(ids))
        builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    megatron(tmp_path / "ours", MEGATRON, core.DType.code_from_dtype(dtype), np.dtype(dtype).str)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()
    tokens, theirs = opened(train, tmp_path / "theirs"), core.IndexedDataset(str(tmp_path / "theirs"))
    assert tokens.read(0, tokens.count).tolist() == np.concatenate([theirs[n] for n in range(len(theirs))]).tolist()
    lengths = theirs.index.sequence_lengths.cumsum()
    assert tokens.ends.tolist() == [lengths[n - 1] for n in theirs.index.document_indices[1:]]
