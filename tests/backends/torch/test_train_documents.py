"""Documents in files at the bounds of what `train.py` reads: where they are cut, how much is read, what is said."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from .data_files import program


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with program(tmp_path_factory.mktemp("train")) as modules:
        yield modules


def lines(train: Any, path: Path) -> list[dict[str, Any]]:
    return [row.values for row in train.documents.json_lines(path)]


@pytest.mark.parametrize("length", [*range(12), 19, 20, 21, 22, 30, 45, 101])
@pytest.mark.parametrize("letters", ["abcdefghi", "ab\ncd efghijklm", "aü東京🦊b"])
def test_a_file_is_cut_as_its_text_is(
    train: Any, tmp_path: Path, length: int, letters: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However its bytes are read, 10 at a time, none of which need end with a character."""
    monkeypatch.setattr(train.documents, "MOST_TEXT", 10)
    text = (letters * length)[:length]
    files = [tmp_path / "one", tmp_path / "two"]
    for file in files:
        file.write_text(text, "utf-8")
    assert list(train.documents.texts_of_files(files)) == 2 * list(train.documents.pieces(text))


@pytest.mark.parametrize("length", [10, 19, 20, 21, 28])
def test_a_file_that_ends_within_a_character(
    train: Any, tmp_path: Path, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train.documents, "MOST_TEXT", 10)
    path = tmp_path / "text"
    path.write_bytes(b"a" * (length - 1) + "ü".encode()[:1])
    with pytest.raises(train.settings.TrainError, match=f"is no UTF-8: unexpected end of data before byte {length}$"):
        list(train.documents.texts_of_files([path]))


def test_what_a_file_has_when_it_is_opened(train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What others write to its end meanwhile is left out, of lines as of text."""
    monkeypatch.setattr(train.documents, "MOST_TEXT", 10)
    path = tmp_path / "text"
    path.write_text("a" * 40)
    pieces = train.documents.texts_of_files([path])
    found = [next(pieces).text]
    path.write_text("a" * 99)
    assert len("".join([*found, *(piece.text for piece in pieces)])) == 40
    path.write_text('{"n": 1}\n{"n": 2}\n')
    rows = train.documents.json_lines(path)
    first = next(rows)
    with path.open("a") as file:
        file.write('{"n": 3}\n')
    assert [row.values["n"] for row in (first, *rows)] == [1, 2]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_the_longest_line(train: Any, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its end counts; another line may follow."""
    monkeypatch.setattr(train.documents, "MOST_LINE", 20)
    path = tmp_path / f"lines.jsonl{suffix}"
    write = gzip.compress if suffix else bytes
    path.write_bytes(write(b'{"text": "12345678"}'.ljust(19) + b'\n{"text": 1}\n'))
    with pytest.raises(train.settings.TrainError, match="row 1: longer than 0 MiB"):
        lines(train, path)
    path.write_bytes(write(b'{"text": "1234567"}\n{"text": 1}\n'))
    assert lines(train, path) == [{"text": "1234567"}, {"text": 1}]


def test_what_unpacks_to_a_hundred_times_its_size(train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be text, though more than a longest line."""
    monkeypatch.setattr(train.documents, "MOST_LINE", 1 << 12)
    content = b"".join(b'{"text": "%d%s"}\n' % (n, b"a" * 250) for n in range(999))
    packed = gzip.compress(content)
    assert 50 < len(content) / len(packed) < 190
    (tmp_path / "lines.jsonl.gz").write_bytes(packed)
    assert len(lines(train, tmp_path / "lines.jsonl.gz")) == 999


@pytest.mark.parametrize("name", ["table.parquet", "table.arrow", "stream.arrow"])
def test_rows_of_long_tables(train: Any, tmp_path: Path, name: str) -> None:
    """All of them, in their order, with their numbers, of the columns that are asked for and there."""
    table = pa.table({"other": list(range(300)), "text": [str(n) for n in range(300)]})
    with pa.OSFile(str(tmp_path / "table.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=130)
    with pa.OSFile(str(tmp_path / "stream.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=130)
    pq.write_table(table, tmp_path / "table.parquet", row_group_size=130)
    path = tmp_path / name
    rows = list(train.documents.rows_of(path.suffix[1:], [path, path], ("text", "tools")))
    assert [row.values for row in rows] == 2 * [{"text": str(n)} for n in range(300)]
    assert [row.number for row in rows] == 2 * list(range(1, 301))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError("damaged\nat a place"), "after row 2: damaged"),
        (ValueError(" \n"), "after row 2: ValueError"),
        (MemoryError(), "after row 2: MemoryError"),
    ],
)
def test_errors_of_tables_are_one_line(
    train: Any, tmp_path: Path, error: Exception, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def batches(*_: object) -> Iterator[Any]:
        yield pa.record_batch({"text": ["a", "b"]})
        raise error

    monkeypatch.setattr(train.documents, "parquet_batches", batches)
    with pytest.raises(train.settings.TrainError) as raised:
        list(train.documents.rows_of("parquet", [tmp_path / "x"], ("text",)))
    assert str(raised.value) == f"{tmp_path}/x, {said}" and raised.value.code == 6


def test_eight_names_are_told(train: Any, tmp_path: Path) -> None:
    """Of the fields of a line, and of the columns of a table."""
    names = [f"n{number}" for number in range(9)]
    row = train.documents.Row(tmp_path, 1, dict.fromkeys(names, "x"))
    told = f"{', '.join(names[:8])}:"
    with pytest.raises(train.settings.TrainError, match=f"there is no text, but {told} --text-field names the field"):
        list(train.documents.texts_of_rows([row], "text"))
    with pytest.raises(train.settings.TrainError, match=f"has no column text, but {told}"):
        train.documents.columns_of(tmp_path, names, ("text",))
    with pytest.raises(train.settings.TrainError, match="has no column text, but none:"):
        train.documents.columns_of(tmp_path, [], ("text",))
    assert train.documents.columns_of(tmp_path, names, ("n2", "tools", "n1")) == ["n2", "n1"]


def conversations_of(ids: list[int], offsets: list[tuple[int, int]]) -> Any:
    """Return conversations whose every text has these tokens."""

    def encode(_: str, add_special_tokens: bool) -> SimpleNamespace:
        assert not add_special_tokens
        return SimpleNamespace(ids=ids, offsets=offsets)

    return SimpleNamespace(tokenizer=SimpleNamespace(tokenizer=SimpleNamespace(encode=encode)))


@pytest.mark.parametrize(("length", "read"), [(1 << 20, True), ((1 << 20) + 1, False)])
def test_the_longest_conversation(train: Any, length: int, read: bool) -> None:
    conversations = conversations_of([7], [(0, length)])
    if read:
        assert train.chat.Conversations.encoded(conversations, "a" * length, []).ids == [7]
        return
    with pytest.raises(ValueError, match="a conversation of 1048577 characters, more than 1048576"):
        train.chat.Conversations.encoded(conversations, "a" * length, [])


def test_what_the_assistant_says_begins_where_it_says_so(train: Any) -> None:
    """A token is counted that begins in a span, whatever lies before it and behind."""
    conversations = conversations_of([*range(12)], [(n, n + 1) for n in range(12)])
    found = train.chat.Conversations.encoded(conversations, "a" * 12, [(2, 4), (4, 5), (9, 11)])
    assert [n for n in range(12) if found.trained[n]] == [2, 3, 4, 9, 10] and found.last


def test_empty_conversations_are_counted(train: Any) -> None:
    """And no others: what no assistant answers has no token."""

    def documents(messages: list[Any], _: object) -> list[tuple[str, list[tuple[int, int]]]]:
        return [("text", [(0, 4)])] * len(messages)

    def encoded(*_: object) -> Any:
        return train.tokenizer.Encoded([7], b"\1", last=True)

    conversations = train.chat.Conversations.__new__(train.chat.Conversations)
    conversations.field, conversations.encoded = "messages", encoded
    conversations.template = SimpleNamespace(documents=documents)
    rows = [train.documents.Row(Path("x"), n, {"messages": [{}] * n or None}) for n in range(3)]
    assert [encoded.ids for encoded in conversations.encode(rows)] == [[], [7], [7], [7]]


def test_a_file_of_one_token(train: Any, tmp_path: Path) -> None:
    """Not of none: each kind at its least."""
    (tmp_path / "one").write_bytes(b"\7")
    assert train.token_files.mapped(tmp_path / "one", 0, torch.uint8).tolist() == [7]
    (tmp_path / "none").write_bytes(b"")
    assert train.token_files.mapped(tmp_path / "none", 0, torch.uint8).tolist() == []
    np.save(tmp_path / "one.npy", np.array([7], "<u2"))
    assert train.token_files.mapped(tmp_path / "one.npy", 128, torch.uint16).tolist() == [7]
