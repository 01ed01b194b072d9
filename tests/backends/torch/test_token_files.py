"""Files of tokens at the bounds of what `train.py` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

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


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int64])
def test_files_of_few_tokens(train: Any, tmp_path: Path, dtype: torch.dtype) -> None:
    """None, one and two, behind a header of so many bytes; half a token, or half of one before it, is refused."""
    path, size = tmp_path / "tokens", dtype.itemsize
    for count in range(3):
        for before in (0, 8):
            path.write_bytes(bytes(before) + b"".join((7 + n).to_bytes(size, "little") for n in range(count)))
            tokens = train.token_files.mapped(path, before, dtype)
            assert tokens.dtype == dtype and tokens.tolist() == [7 + n for n in range(count)]
    for content, offset in ((bytes(size + 1), 0), (bytes(2 * size + 1), size + 1)) if size > 1 else ():
        path.write_bytes(content)
        with pytest.raises(train.settings.TrainError, match=f"is no file of {dtype}: {len(content) - offset} bytes$"):
            train.token_files.mapped(path, offset, dtype)


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize("shape", ["(6,)", "(2, 3)", "(0,)", "(0, 3)"])
def test_headers_of_npy(train: Any, tmp_path: Path, version: int, shape: str) -> None:
    """Their length has 2 bytes in version 1, and 4 in the others; rows follow each other."""
    header = f"{{'descr': '<u4', 'fortran_order': False, 'shape': {shape}}}".encode().ljust(70)
    length, path = len(header).to_bytes(2 if version == 1 else 4, "little"), tmp_path / "tokens.npy"
    data = b"" if "0" in shape else bytes(24)
    path.write_bytes(b"\x93NUMPY" + bytes([version, 0]) + length + header + data)
    assert train.token_files.npy_header(path) == (8 + len(length) + 70, torch.uint32)
    for wrong in (data + b"!", data[:-1] if data else b"!"):
        path.write_bytes(b"\x93NUMPY" + bytes([version, 0]) + length + header + wrong)
        with pytest.raises(train.settings.TrainError, match="is not as long as the"):
            train.token_files.npy_header(path)


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<u2', 'fortran_order': True, 'shape': (2, 3)}",
        "{'descr': '<u2', 'fortran_order': False, 'shape': ()}",
        "{'descr': '<u2', 'fortran_order': False, 'shape': (1, 2, 3)}",
        "{'descr': '<u2', 'fortran_order': False, 'shape': (-1,)}",
        "{'descr': '<u2', 'fortran_order': False, 'shape': (-1, -6)}",
        "{'descr': '<u2', 'fortran_order': False, 'shape': (6.0,)}",
        "{'descr': '<f2', 'fortran_order': False, 'shape': (6,)}",
        "{'descr': '>u2', 'fortran_order': False, 'shape': (6,)}",
        "{'descr': '<u2', 'fortran_order': False}",
        "['descr']",
    ],
)
def test_headers_of_other_arrays(train: Any, tmp_path: Path, header: str) -> None:
    """As long as they say: what is refused is what they have. One row may be in the order of columns."""
    path, text = tmp_path / "tokens.npy", header.encode()
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(12))
    with pytest.raises(train.settings.TrainError, match=r"is no \.npy file of \|u1, <u2, <u4, <i4, <i8, \[T\] or rows"):
        train.token_files.npy_header(path)
    text = b"{'descr': '<u2', 'fortran_order': True, 'shape': (6,)}"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(12))
    assert train.token_files.npy_header(path) == (10 + len(text), torch.uint16)
