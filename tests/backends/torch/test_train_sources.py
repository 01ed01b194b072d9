"""What `train.py` says of its data, and the types in which it has them: at the bounds of vocabularies and files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from .data_files import make_tokenizer, program, settings_of


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with program(tmp_path_factory.mktemp("train")) as modules:
        yield modules


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return folder


def opened(train: Any, data: Path, *more: str) -> Any:
    """Return the tokens of --data."""
    return train.sources.open_tokens(data, settings_of(train, data, data.parent / "out", *more))


def test_one_character(train: Any, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Is a document; an empty file is none, and told."""
    (tmp_path / "texts").mkdir()
    for name, text in (("0", "a"), ("1", ""), ("2", "b")):
        (tmp_path / "texts" / name).write_text(text)
    tokens = opened(train, tmp_path / "texts", "--tokenizer", str(tokenizer), "--data-format", "text")
    assert tokens.ends.tolist() == [2, 4]
    said = (
        f"{tmp_path}/texts: 3 files of text, 2 documents, 4 tokens (uint16, by {tokenizer}, token 2 ends each document"
    )
    assert tokens.opened == f"{said}; 1 empty documents left out)"
    assert f"making tokens of {tmp_path}/texts (3 files, 2e-09 GB) in {tmp_path}/out/tokens" in capsys.readouterr().err


@pytest.mark.parametrize(("vocabulary", "size", "kind"), [(1 << 16, 2, "uint16"), ((1 << 16) + 1, 4, "uint32")])
def test_types_of_tokens(
    train: Any, tokenizer: Path, tmp_path: Path, vocabulary: int, size: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two bytes are enough for 65,536 tokens, in files of them and in those that are made."""
    monkeypatch.setattr(train.sources, "Config", lambda: SimpleNamespace(vocab_size=vocabulary))
    last = vocabulary - 1
    (tmp_path / "ids.bin").write_bytes(last.to_bytes(size, "little") * 3)
    tokens = opened(train, tmp_path / "ids.bin")
    assert tokens.read(0, 3).tolist() == [last] * 3 and f"3 tokens ({kind})" in tokens.opened
    (tmp_path / "text").write_text("ab")
    tokens = opened(train, tmp_path / "text", "--tokenizer", str(tokenizer))
    assert tokens.parts[0].dtype == (torch.uint16 if size == 2 else torch.int32)


@pytest.mark.parametrize("separator", [0, 3])
def test_a_token_that_ends_a_document(train: Any, tokenizer: Path, tmp_path: Path, separator: int) -> None:
    """Any, the first of the vocabulary, too; of bytes as of a tokenizer's. An empty document has none."""
    (tmp_path / "lines.jsonl").write_text('{"text": "a"}\n{"text": ""}\n{"text": "b"}\n')
    given = ["--tokenizer", str(tokenizer), "--document-separator", str(separator)]
    tokens = opened(train, tmp_path / "lines.jsonl", *given)
    assert tokens.read(0, 4)[1::2].tolist() == [separator] * 2 and tokens.ends.tolist() == [2, 4]
    pieces = [train.documents.Piece(text, True, last) for text, last in (("a", False), ("b", True), ("", True))]
    made = train.tokenizer.ByteTokenizer(separator)
    assert [encoded.ids for encoded in made.encode(pieces)] == [[97], [98, separator], []]
    plain = train.tokenizer.ByteTokenizer(-1)
    assert [encoded.ids for encoded in plain.encode(pieces)] == [[97], [98], []]
    assert made.identity != plain.identity


def test_documents_whose_ends_do_not_count(train: Any, tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "lines.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    given = ["--tokenizer", str(tokenizer), "--no-document-boundaries"]
    tokens = opened(train, tmp_path / "lines.jsonl", *given)
    assert tokens.ends is None and "2 documents" in tokens.opened


def test_a_tokenizer_as_large_as_the_model(train: Any, tokenizer: Path) -> None:
    assert train.tokenizer.Tokenizer(tokenizer, 352, -1).end == 2
    with pytest.raises(train.settings.TrainError, match="has 352 tokens, and the model 351") as error:
        train.tokenizer.Tokenizer(tokenizer, 351, -1)
    assert error.value.code == 2


def test_files_beside_a_tokenizer(train: Any, tmp_path: Path) -> None:
    """They are read up to a size; what is no object of JSON has no fields."""
    path = tmp_path / "config.json"
    assert train.tokenizer.read(path, 3) is None and train.tokenizer.read_table(path) == {}
    path.write_bytes(b"123")
    assert train.tokenizer.read(path, 3) == b"123" and train.tokenizer.read_table(path) == {}
    for most in (2, 1):
        with pytest.raises(train.settings.TrainError, match=f"has more than {most} bytes"):
            train.tokenizer.read(path, most)
    path.write_text(json.dumps({"a": 1}))
    assert train.tokenizer.read_table(path) == {"a": 1}
    path.write_text("{")
    with pytest.raises(train.settings.TrainError, match="is no JSON: "):
        train.tokenizer.read_table(path)
    with path.open("wb") as file:
        file.truncate((1 << 24) + 1)
    with pytest.raises(train.settings.TrainError, match="has more than 16777216 bytes"):
        train.tokenizer.read_table(path)


def test_names_of_special_tokens(train: Any) -> None:
    config = {"eos_token": "</s>", "bos_token": {"content": "<s>"}, "pad_token": None, "unk_token": {}, "model": "x"}
    assert train.tokenizer.special_tokens_of(config) == {"eos_token": "</s>", "bos_token": "<s>"}


def test_pieces_in_batches(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, in their order, of about so many characters, or at most 4,096 together."""
    monkeypatch.setattr(train.tokenizer, "BATCH", 100)
    pieces = [train.documents.Piece("a" * 19, True, True)] * 12
    assert [len(batch) for batch in train.tokenizer.batches(pieces)] == [5, 5, 2]
    monkeypatch.setattr(train.tokenizer, "BATCH", 1 << 20)
    pieces = [train.documents.Piece("", True, True)] * 5000
    assert [len(batch) for batch in train.tokenizer.batches(pieces)] == [4096, 904]
