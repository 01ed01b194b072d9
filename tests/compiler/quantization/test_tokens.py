"""Calibration files: what they may hold, and what is wrong with others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from n3c.compiler.quantization.calibration.tokens import read_tokens
from n3c.ir.diagnostics import ExitCode, N3CError


def save(path: Path, ids: np.ndarray) -> Path:
    np.save(path, ids)
    return path


def test_a_row_of_tokens_is_cut_and_samples_are_spread(tmp_path: Path) -> None:
    path = save(tmp_path / "ids.npy", np.arange(95, dtype=np.uint16))
    ids = read_tokens(path, 97, samples=3, length=10)
    assert ids.tolist() == [list(range(start, start + 10)) for start in (0, 40, 80)]
    assert read_tokens(path, 97, samples=100, length=10).shape == (9, 10)
    assert read_tokens(path, 97, samples=2, length=1000).shape == (1, 95)


def test_rows_of_tokens_stay_rows(tmp_path: Path) -> None:
    path = save(tmp_path / "ids.npy", np.arange(60).reshape(4, 15))
    assert read_tokens(path, 97, samples=9, length=5).tolist() == [list(range(i, i + 5)) for i in (0, 15, 30, 45)]


@pytest.mark.parametrize(("vocabulary", "dtype"), [(97, "<u2"), (1 << 17, "<u4")])
def test_raw_integers(tmp_path: Path, vocabulary: int, dtype: str) -> None:
    (tmp_path / "ids.bin").write_bytes(np.arange(20, dtype=dtype).tobytes())
    assert read_tokens(tmp_path / "ids.bin", vocabulary, samples=1, length=20).tolist() == [list(range(20))]


def test_text_is_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("aé", encoding="utf-8")
    assert read_tokens(tmp_path / "a.txt", 256, samples=1, length=9).tolist() == [[97, 0xC3, 0xA9]]


@pytest.mark.parametrize(
    ("name", "data", "code", "words"),
    [
        ("a.npy", b"", "E0630", "empty"),
        ("a.npy", b"text", "E0630", "not a NumPy array"),
        ("a.npy", np.zeros((2, 3), np.float32), "E0630", "token ids are integers"),
        ("a.npy", np.zeros((2, 3, 4), np.int64), "E0630", "3-dimensional"),
        ("a.npy", np.zeros((4, 1), np.int64), "E0630", "rows of 1 tokens"),
        ("a.npy", np.zeros(1, np.int64), "E0630", "1 tokens"),
        ("a.npy", np.array([1, 97, 2]), "E0631", "token 1 is 97: the vocabulary has ids 0 to 96"),
        ("a.npy", np.array([1, 2, -1]), "E0631", "token 2 is -1"),
        ("a.bin", b"", "E0630", "0 bytes"),
        ("a.bin", b"abc", "E0630", "take 2 bytes each"),
        ("none.npy", None, "E0601", "cannot read"),
    ],
)
def test_files_that_hold_no_tokens(
    tmp_path: Path, name: str, data: bytes | np.ndarray | None, code: str, words: str
) -> None:
    path = tmp_path / name
    if isinstance(data, bytes):
        path.write_bytes(data)
    elif data is not None:
        np.save(path, data)
    with pytest.raises(N3CError, match=words) as caught:
        read_tokens(path, 97, samples=4, length=8)
    (diagnostic,) = caught.value.diagnostics
    assert (diagnostic.code, caught.value.exit_code) == (code, ExitCode.FILE)
    assert diagnostic.span is not None
    assert diagnostic.span.file == str(path)


def test_text_needs_a_vocabulary_of_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words", encoding="utf-8")
    with pytest.raises(N3CError, match="text needs the tokenizer") as caught:
        read_tokens(tmp_path / "a.txt", 97, samples=1, length=8)
    assert (caught.value.diagnostics[0].code, caught.value.exit_code) == ("E0703", ExitCode.USAGE)
