"""Calibration data: read as train.py reads its own, and refused as there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from n3c.compiler.quantization.calibration.tokens import Sequences, read_tokens
from n3c.compiler.quantization.request import CalibrationData
from n3c.ir.diagnostics import ExitCode, N3CError
from n3c.specs.schema import Spec
from support.small_engine import TEXT
from support.specs import spec_from_text

BOTTLES = [f"{n} green bottles hanging on the wall" for n in range(40)]


def spec_of(vocabulary: int) -> Spec:
    return spec_from_text(TEXT.replace("vocab_size = 97", f"vocab_size = {vocabulary}"))


def read(path: Path, vocabulary: int = 97, *, samples: int, length: int, **how: Any) -> Sequences:
    return read_tokens(spec_of(vocabulary), CalibrationData(path, samples, length, **how))


def save(path: Path, ids: np.ndarray) -> Path:
    np.save(path, ids)
    return path


def test_a_row_of_tokens_is_cut_and_samples_are_spread(tmp_path: Path) -> None:
    path = save(tmp_path / "ids.npy", np.arange(95, dtype=np.uint16))
    ids, opened = read(path, samples=3, length=10)
    assert ids.tolist() == [list(range(start, start + 10)) for start in (0, 40, 80)]
    assert opened == [f"{path}: 1 file of token ids, 95 tokens (uint16)"]
    assert read(path, samples=100, length=10).ids.shape == (9, 10)
    assert read(path, samples=2, length=1000).ids.shape == (1, 95)


def test_rows_of_tokens_follow_each_other(tmp_path: Path) -> None:
    path = save(tmp_path / "ids.npy", np.arange(60).reshape(4, 15))
    assert read(path, samples=9, length=15).ids.tolist() == [list(range(i, i + 15)) for i in (0, 15, 30, 45)]


@pytest.mark.parametrize(("vocabulary", "kind"), [(97, "uint16"), (1 << 17, "uint32"), (97, "int64")])
def test_raw_integers(tmp_path: Path, vocabulary: int, kind: str) -> None:
    (tmp_path / "ids.bin").write_bytes(np.arange(20, dtype=kind).tobytes())
    how = {"dtype": kind} if kind == "int64" else {}
    assert read(tmp_path / "ids.bin", vocabulary, samples=1, length=20, **how).ids.tolist() == [list(range(20))]


def test_text_is_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("aé", encoding="utf-8")
    assert read(tmp_path / "a.txt", 256, samples=1, length=9).ids.tolist() == [[97, 0xC3, 0xA9]]


def test_of_documents_the_first_are_read(tmp_path: Path) -> None:
    """A column of Parquet, and the rest of the file is left alone."""
    table = pa.table({"body": [*BOTTLES, None], "text": [1] * 41})
    parquet.write_table(table, tmp_path / "a.parquet")
    ids, (opened,) = read(tmp_path / "a.parquet", 256, samples=2, length=50, text_field="body")
    assert bytes(ids.flatten().tolist()) == "".join(BOTTLES).encode()[:100]
    assert opened.startswith(f"{tmp_path / 'a.parquet'}: 1 file of Parquet")
    (tmp_path / "long.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in BOTTLES) + "no JSON")
    assert read(tmp_path / "long.jsonl", 256, samples=2, length=50).ids.shape == (2, 50)


def test_a_mixture_gives_each_source_its_share(tmp_path: Path) -> None:
    for name, start in (("a", 0), ("b", 50)):
        save(tmp_path / f"{name}.npy", np.arange(start, start + 40))
    tables = [
        f'[[source]]\npath = "{tmp_path}/{name}.npy"\nweight = {weight}\n' for name, weight in (("a", 3), ("b", 1))
    ]
    (tmp_path / "mix.toml").write_text("".join(tables))
    ids, opened = read(tmp_path / "mix.toml", samples=8, length=5)
    assert [row[0] < 50 for row in ids.tolist()] == [True] * 6 + [False] * 2
    assert len(opened) == 2


@pytest.mark.parametrize(
    ("name", "data", "code", "words"),
    [
        ("a.npy", b"", "E0630", "is no .npy file"),
        ("a.npy", b"text", "E0630", "is no .npy file"),
        ("a.npy", np.zeros((2, 3), np.float32), "E0630", "is no .npy file"),
        ("a.npy", np.zeros((2, 3, 4), np.int64), "E0630", "is no .npy file"),
        ("a.npy", np.zeros(0, np.int64), "E0630", "holds no tokens"),
        ("a.npy", np.zeros(1, np.int64), "E0630", "sequences of 1 tokens"),
        ("a.npy", np.array([1, 97, 2]), "E0630", "holds token 97, and the vocabulary has 97"),
        ("a.npy", np.array([1, 2, -1]), "E0630", "holds token -1"),
        ("a.bin", b"", "E0630", "holds no tokens"),
        ("a.bin", b"abc", "E0630", "is no file of torch.uint16"),
        ("none.npy", None, "E0601", "cannot read"),
        ("a.txt", b"%PDF-1.7", "E0630", "is a PDF file, and no text: extract its text"),
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
        read(path, samples=4, length=8)
    (diagnostic,) = caught.value.diagnostics
    assert (diagnostic.code, caught.value.exit_code) == (code, ExitCode.FILE)
    assert diagnostic.span is not None
    assert diagnostic.span.file == str(path)


@pytest.mark.parametrize(
    ("name", "how", "words"),
    [
        ("a.txt", {}, "tokens are a tokenizer's: give --tokenizer DIR"),
        ("a.jsonl", {}, "is JSON lines, and the model's 97 tokens are a tokenizer's"),
        ("a.jsonl", {"data_format": "csv"}, "--data-format csv is none of"),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, name: str, how: dict[str, Any], words: str) -> None:
    (tmp_path / name).write_text("words", encoding="utf-8")
    with pytest.raises(N3CError, match=words) as caught:
        read(tmp_path / name, samples=1, length=8, **how)
    assert (caught.value.diagnostics[0].code, caught.value.exit_code) == ("E0703", ExitCode.USAGE)
