"""What train.py says to bad data, and how it reads good: run in this process."""

from __future__ import annotations

import bz2
import gzip
import io
import os
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from .training_program import TEXT, arguments, failure, opened


def npy(array: Any) -> bytes:
    """Return the bytes of a .npy file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing", None, "cannot be read: No such file or directory"),
        ("empty", b"", "holds no tokens"),
        ("short", b"abc", "holds 3 tokens, and one sequence has 16"),
        ("odd.bin", b"abc", "is no file of torch.uint16: 3 bytes"),
        ("wrong.npy", b"\x93NUMPY\x01\x00\x05\x00{'a':", "is no .npy file"),
        ("float.npy", np.zeros(99), "is no .npy file"),
        ("cube.npy", np.zeros((9, 9, 9), np.uint16), "is no .npy file"),
        ("columns.npy", np.zeros((9, 8), np.uint16, "F"), "is no .npy file"),
        ("beyond.npy", np.array([1, 2, 3] * 20 + [256] + [1] * 9), "holds token 256, and the vocabulary has 256"),
        ("cut.npy", npy(np.arange(99, dtype=np.uint16))[:-50], "is not as long as the 99 tokens of its header"),
        ("negative.npy", np.array([1] * 20 + [-1]), "holds token -1"),
        ("long.npy", b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b" " * 99, "is no .npy file"),
        ("deep.npy", b"\x93NUMPY\x01\x00\x0f\x27" + b"-" * 9999, "is no .npy file"),
        ("shape.npy", b"\x93NUMPY\x01\x00\x23\x00{'descr': '<u2', 'shape': (True,)}  ", "is no .npy file"),
        ("packed.txt", gzip.compress(TEXT, mtime=0), "is a gzip archive"),
        ("packed.dat", bz2.compress(TEXT), "is a bzip2 archive"),
        ("beyond.bin", np.array([7] * 20 + [999], np.uint16).tobytes(), "(the first wrong one is token 20)"),
    ],
)
def test_bad_data(
    train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: Any, message: str
) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content)
    said = failure(train, capsys, 6, *arguments(path, tmp_path / "out"))
    assert message in said and name in said


@pytest.mark.parametrize("name", ["zero", "pipe", "link", "pipe.bin", "pipe.npy"])
def test_what_may_never_end_is_refused(
    train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    path = Path("/dev/zero") if name == "zero" else tmp_path / name
    if name.startswith("pipe"):
        os.mkfifo(path)
    elif name == "link":
        path.symlink_to("/dev/zero")
    assert f"{path} is not a regular file" in failure(train, capsys, 6, *arguments(path, tmp_path / "out"))


def test_loops_of_links(train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "above").symlink_to(tmp_path, target_is_directory=True)
    said = failure(train, capsys, 6, *arguments(tmp_path / "loop", tmp_path / "out"))
    assert "cannot be read: Too many levels of symbolic links" in said
    (tmp_path / "text").write_bytes(TEXT)
    assert opened(train, tmp_path).count == len(TEXT)


def test_a_sparse_giant_is_refused(train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (tmp_path / "giant.bin").open("wb") as file:
        file.truncate(1 << 43)
    said = failure(train, capsys, 6, *arguments(tmp_path / "giant.bin", tmp_path / "out"))
    assert "cannot be mapped into memory" in said or "take a longer --seq-len" in said


def test_more_windows_than_an_order_in_memory_has(
    train: Any, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train.data, "MOST_WINDOWS", 3)
    said = failure(train, capsys, 6, *arguments(text, tmp_path / "out"))
    assert "sequences of 16 tokens, more than 3: take a longer --seq-len" in said


def test_texts_of_any_size(train: Any, tmp_path: Path) -> None:
    """Large ones are mapped, small ones read, empty ones nothing; a window goes across them."""
    texts = [b"small", bytes(range(256)) * 4096 + b"!", b"", TEXT, bytes(1 << 20)]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_bytes(text)
    tokens, whole = opened(train, tmp_path), b"".join(texts)
    assert tokens.count == len(whole) and tokens.bytes_are_tokens
    for start in (0, 3, len(texts[1]) - 2, len(texts[1]) + 3, len(whole) - 4000):
        assert bytes(tokens.read(start, 4000).tolist()) == whole[start : start + 4000]


def test_more_files_than_may_be_open(train: Any, tmp_path: Path) -> None:
    for number in range(300):
        np.full(5, number % 256, "<u2").tofile(tmp_path / f"{number:03}.bin")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        tokens = opened(train, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert tokens.read(4, 7).tolist() == [0, 1, 1, 1, 1, 1, 2]


def test_empty_folder(train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / ".hidden").write_bytes(TEXT)
    assert "holds no tokens" in failure(train, capsys, 6, *arguments(tmp_path / "data", tmp_path / "out"))


def test_reads_every_form_alike(train: Any, tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 256, 1000)
    for kind in (np.uint8, np.uint16, np.uint32, np.int32, np.int64):
        np.save(tmp_path / f"{kind.__name__}.npy", ids.astype(kind))
    (tmp_path / "raw.bin").write_bytes(ids.astype("<u2").tobytes())
    (tmp_path / "bytes").write_bytes(bytes(ids.tolist()))
    (tmp_path / "parts" / "b").mkdir(parents=True)
    np.save(tmp_path / "parts" / "a.npy", ids[:300])
    (tmp_path / "parts" / "b" / "c.bin").write_bytes(ids[300:].astype("<u2").tobytes())
    (tmp_path / "parts" / "readme").write_text("not tokens")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "1").write_bytes(bytes(ids[:301].tolist()))
    (tmp_path / "texts" / "2").write_bytes(bytes(ids[301:].tolist()))
    for path in tmp_path.iterdir():
        tokens = opened(train, path)
        assert tokens.count == 1000
        for start, length in ((0, 1000), (299, 2), (300, 1), (990, 10)):
            assert tokens.read(start, length).tolist() == ids[start : start + length].tolist(), path


def test_epochs_are_shuffled_windows(train: Any, tmp_path: Path) -> None:
    """Each epoch reads every window once, in an order of its own that depends on the seed alone."""
    np.save(tmp_path / "ids.npy", np.arange(64))
    tokens = opened(train, tmp_path / "ids.npy")
    windows = train.data.Windows(tokens, 0, 64, 8, seed=3)
    epochs = [[windows.shuffled(e * 8 + n).ids.tolist() for n in range(8)] for e in range(2)]
    for epoch in epochs:
        assert sorted(x for window in epoch for x in window) == list(range(64))
    assert epochs[0] != epochs[1]
    other = train.data.Windows(tokens, 0, 64, 8, seed=4)
    assert [other.shuffled(n).ids.tolist() for n in range(8)] != epochs[0]


def test_documents(train: Any) -> None:
    """A separator is the last token of its document."""
    ids = torch.tensor([[7, 3, 3, 5, 3], [3, 1, 1, 1, 1]])
    assert train.data.documents_of(ids, -1) is None
    assert train.data.documents_of(ids, 3).tolist() == [[0, 0, 1, 2, 2], [0, 1, 1, 1, 1]]
