"""What train.py reads: files written by the libraries whose formats they are, in every form that people have."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import sys
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from .data_files import DOCUMENTS, END, make_tokenizer, program, settings_of

datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with program(tmp_path_factory.mktemp("train")) as modules:
        yield modules


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of a tokenizer and of the documents in every form."""
    folder = tmp_path_factory.mktemp("data")
    make_tokenizer(folder / "tokenizer")
    lines = "".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(DOCUMENTS)).encode()
    (folder / "lines.jsonl").write_bytes(lines)
    (folder / "lines.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "lines.ndjson.bz2").write_bytes(bz2.compress(lines))
    (folder / "lines.json.xz").write_bytes(lzma.compress(lines))
    with pa.output_stream(str(folder / "lines.jsonl.zst"), compression="zstd") as stream:
        stream.write(lines)
    table = pa.table({"id": list(range(len(DOCUMENTS))), "text": DOCUMENTS})
    pq.write_table(table, folder / "table.parquet", row_group_size=7)
    with pa.OSFile(str(folder / "table.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=9)
    with pa.OSFile(str(folder / "stream.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=11)
    dataset = datasets.Dataset.from_dict(table.to_pydict())
    dataset.save_to_disk(str(folder / "saved"), num_shards=3)
    dataset.select(range(10)).save_to_disk(str(folder / "selected"))  # of which it writes the chosen rows alone
    datasets.DatasetDict({"train": dataset, "test": dataset}).save_to_disk(str(folder / "splits"))
    (folder / "texts").mkdir()
    (folder / "parquets").mkdir()
    for number, text in enumerate(DOCUMENTS):
        (folder / "texts" / f"{number:02}.txt").write_text(text, "utf-8")
    pq.write_table(table.slice(0, 15), folder / "parquets" / "0.parquet")
    pq.write_table(table.slice(15), folder / "parquets" / "1.parquet")
    (folder / "parquets" / "README.md").write_text("not data")
    (folder / "parquets" / "info.json").write_text('{"rows": 40}')
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))


def opened(train: Any, data: Path, out: Path, *more: str) -> Any:
    """Return the tokens of --data."""
    return train.sources.open_tokens(data, settings_of(train, data, out, *more))


def tokens_of(tokenizer: Tokenizer, texts: list[str]) -> tuple[list[int], list[int]]:
    """Return the tokens of documents, and where each of them ends."""
    encoded = [[*tokenizer.encode(text).ids, END] for text in texts]
    return [token for ids in encoded for token in ids], list(accumulate(map(len, encoded)))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("lines.jsonl", "1 file of JSON lines"),
        ("lines.jsonl.gz", "1 file of JSON lines"),
        ("lines.ndjson.bz2", "1 file of JSON lines"),
        ("lines.json.xz", "1 file of JSON lines"),
        ("lines.jsonl.zst", "1 file of JSON lines"),
        ("table.parquet", "1 file of Parquet"),
        ("parquets", "2 files of Parquet"),
        ("table.arrow", "1 file of Arrow"),
        ("stream.arrow", "1 file of Arrow"),
        ("saved", "3 files of Arrow"),
        ("texts", "40 files of text"),
    ],
)
def test_documents(train: Any, folder: Path, tokenizer: Tokenizer, tmp_path: Path, name: str, kind: str) -> None:
    """The same tokens and ends of documents, whatever they come in; and what was opened is said."""
    tokens = opened(train, folder / name, tmp_path, "--tokenizer", str(folder / "tokenizer"))
    ids, ends = tokens_of(tokenizer, DOCUMENTS)
    assert tokens.read(0, tokens.count).tolist() == ids
    assert tokens.ends.tolist() == ends
    said = f"{folder / name}: {kind}, 40 documents, {len(ids):,} tokens (uint16, by {folder}/tokenizer, token 2 ends"
    assert tokens.opened.startswith(said)
    assert tokens.opened.endswith("files of other kinds left out: 2") == (name == "parquets")


def test_what_a_dataset_selected(train: Any, folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokens = opened(train, folder / "selected", tmp_path, "--tokenizer", str(folder / "tokenizer"))
    assert tokens.read(0, tokens.count).tolist() == tokens_of(tokenizer, DOCUMENTS[:10])[0]


def test_what_a_tokenizer_puts_around_a_text(train: Any, folder: Path, tmp_path: Path) -> None:
    """It stays; what ends a document is there once. --document-separator names another token."""
    around = make_tokenizer(tmp_path / "around")
    around.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", END)])
    around.save(str(tmp_path / "around" / "tokenizer.json"))
    for separator, last in ((-1, [END]), (4, [END, 4])):
        given = ["--tokenizer", str(tmp_path / "around"), "--document-separator", str(separator)]
        tokens = opened(train, folder / "lines.jsonl", tmp_path, *given)
        ids = tokens.read(0, tokens.count).tolist()
        assert ids[0] == 1 and ids.count(1) == ids.count(END) == len(DOCUMENTS)
        assert all(ids[end - len(last) : end] == last for end in tokens.ends.tolist())


def test_long_texts_in_parts(
    train: Any, folder: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text is cut before lines and words, where this tokenizer would cut it, too."""
    monkeypatch.setattr(train.documents, "MOST_TEXT", 100)
    monkeypatch.setattr(train.tokenizer, "BATCH", 300)
    text = "\n".join(DOCUMENTS)
    (tmp_path / "long.txt").write_text(text, "utf-8")
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": text}) + "\n")
    for name in ("long.txt", "long.jsonl"):
        tokens = opened(train, tmp_path / name, tmp_path, "--tokenizer", str(folder / "tokenizer"))
        assert tokens.read(0, tokens.count).tolist() == tokens_of(tokenizer, [text])[0]
        assert tokens.ends.tolist() == [tokens.count]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("0123456789", ["0123456789"]),
        ("01234567890", ["0123456789", "0"]),
        ("0123 56\n890", ["0123 56", "\n890"]),
        ("0123 567890", ["0123", " 567890"]),
        ("0\n234567890123", ["0", "\n234567890", "123"]),
        ("\n1234567890", ["\n123456789", "0"]),  # no part is empty
        ("012345678\n0", ["012345678", "\n0"]),
        ("0123456789\n", ["0123456789", "\n"]),
    ],
)
def test_where_a_text_is_cut(train: Any, text: str, parts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Into parts of at most 10 here: before a line, else before a word, else anywhere."""
    monkeypatch.setattr(train.documents, "MOST_TEXT", 10)
    found = list(train.documents.pieces(text))
    assert [piece.text for piece in found] == parts
    assert [(piece.first, piece.last) for piece in found] == [
        (number == 0, number == len(parts) - 1) for number in range(len(parts))
    ]


def test_empty_documents(train: Any, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "some.jsonl").write_text('{"text": "a"}\n\n{"text": ""}\n{"text": null}\n{"text": "b"}')
    tokens = opened(train, tmp_path / "some.jsonl", tmp_path, "--tokenizer", str(folder / "tokenizer"))
    assert len(tokens.ends) == 2 and "2 empty documents left out" in tokens.opened


def test_bytes_where_each_is_a_token(folder: Path, tmp_path: Path) -> None:
    """With a vocabulary of 256 the bytes of a field are its tokens; a file of text is its bytes."""
    with program(tmp_path / "program", 256) as bytewise:
        tokens = opened(bytewise, folder / "table.parquet", tmp_path)
        assert bytes(tokens.read(0, tokens.count).tolist()).decode() == "".join(DOCUMENTS)
        assert tokens.bytes_are_tokens and len(tokens.ends) == 40
        tokens = opened(bytewise, folder / "texts" / "07.txt", tmp_path)
        assert bytes(tokens.read(0, tokens.count).tolist()).decode() == DOCUMENTS[7] and tokens.ends is None
        tokens = opened(bytewise, folder / "lines.jsonl", tmp_path, "--data-format", "bytes")
        assert bytes(tokens.read(0, tokens.count).tolist()) == (folder / "lines.jsonl").read_bytes()


def test_bytes_that_are_asked_for(train: Any, folder: Path, tmp_path: Path) -> None:
    tokens = opened(train, folder / "texts", tmp_path, "--data-format", "bytes")
    assert bytes(tokens.read(0, tokens.count).tolist()).decode() == "".join(DOCUMENTS)
    assert tokens.opened == f"{folder}/texts: 40 files of bytes, {tokens.count:,} tokens (each byte is one)"


@pytest.mark.parametrize("kind", ["uint8", "uint16", "uint32", "int32", "int64"])
def test_token_files_of_a_type(train: Any, tmp_path: Path, kind: str) -> None:
    ids = np.random.default_rng(0).integers(0, 256, 100)
    ids.astype(f"<{np.dtype(kind).str[1:]}").tofile(tmp_path / "ids.bin")
    tokens = opened(train, tmp_path / "ids.bin", tmp_path, "--dtype", kind)
    assert tokens.read(0, 100).tolist() == ids.tolist()
    assert tokens.opened == f"{tmp_path}/ids.bin: 1 file of token ids, 100 tokens ({kind})"


@pytest.mark.parametrize(
    ("name", "content", "code", "message"),
    [
        ("text.txt", b"words", 2, "is text, and the model's 512 tokens are a tokenizer's: give --tokenizer DIR"),
        ("text.txt", b"words", 2, "or --data-format bytes"),
        ("lines.jsonl", b'{"text": "a"}', 2, "is JSON lines, and the model's 512 tokens are a tokenizer's"),
        ("w.safetensors", None, 6, "is a safetensors file, and no text: --weights takes the folder of a checkpoint"),
        ("saved.pt", None, 6, "is a zip archive, and no text: unpack it"),
        ("table.data", b"PAR1" + bytes(9), 6, "is a Parquet file, and no text: --data-format parquet reads it"),
        ("text.gz", gzip.compress(b"text", mtime=0), 6, "is a gzip archive, and no text: unpack it"),
        ("paper.pdf", b"%PDF-1.7", 6, "is a PDF file, and no text: extract its text"),
        ("table.csv", b"a,b\n1,2\n", 6, "is a table, and no text: make it Parquet or JSON lines"),
        ("noise", bytes(99), 6, "has bytes of 0, and is no text"),
    ],
)
def test_no_data(train: Any, tmp_path: Path, name: str, content: bytes | None, code: int, message: str) -> None:
    """What is none is refused by its name, with what helps."""
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    elif name.endswith(".pt"):
        torch.save({"a": torch.ones(2)}, path)
    else:
        save_file({"a": torch.ones(2)}, path)
    with pytest.raises(train.settings.TrainError) as error:
        opened(train, path, tmp_path)
    assert f"{path} {message.split(',')[0].removeprefix('or ')}"[: len(str(path))] == str(path)
    assert message in str(error.value) and str(path) in str(error.value) and error.value.code == code


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"body": "x"}', "row 1: there is no text, but body: --text-field names the field"),
        ("a.jsonl", '{"\\u001b[2J\\u202e": "x"}', r"there is no text, but \x1b[2J\u202e: --text-field names"),
        ("a.jsonl", '{"text": "x"}\n{"text": 3}', "row 2: text is no text, but int"),
        ("a.jsonl", '{"text": "x"}\n{"text":', "row 2: no JSON: Expecting value"),
        ("a.json", '[{"text": "x"}]', "row 1: no JSON object; files of JSON have one in each line"),
        ("a.jsonl", "[" * 100_000, "row 1: no JSON: "),
        ("a.jsonl", '{"text": "\\ud800"}', "row 1: text is no text: surrogates not allowed"),
        ("a.txt", b"good \xff bad", "is no UTF-8: invalid start byte"),
        ("a.parquet", b"PAR1 not", ""),
        ("a.arrow", b"ARROW1 not", ""),
        ("a.arrow", b"", ""),
        ("a.jsonl.gz", b"\x1f\x8b\x08 not", "cannot be unpacked"),
        ("a.jsonl.zst", b"not", "cannot be unpacked"),
    ],
)
def test_damaged_documents(
    train: Any, folder: Path, tmp_path: Path, name: str, content: bytes | str, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(train.settings.TrainError) as error:
        opened(train, path, tmp_path, "--tokenizer", str(folder / "tokenizer"))
    assert message in str(error.value) and str(path) in str(error.value) and error.value.code == 6
    assert [file.name for file in (tmp_path / "tokens").iterdir() if not file.name.endswith(".lock")] == []


def test_columns(train: Any, folder: Path, tmp_path: Path) -> None:
    """A column that is not there, or is no text, is told."""
    for field, message in (("body", "has no column body, but id, text"), ("id", "row 1: id is no text, but int")):
        for name in ("table.parquet", "table.arrow", "saved"):
            given = ["--tokenizer", str(folder / "tokenizer"), "--text-field", field]
            with pytest.raises(train.settings.TrainError, match=message):
                opened(train, folder / name, tmp_path, *given)


def test_folders(train: Any, folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Of a folder of several kinds one is asked for; of splits one is named."""
    given = ["--tokenizer", str(folder / "tokenizer")]
    with pytest.raises(train.settings.TrainError, match=f"is a DatasetDict.*{folder}/splits/train, {folder}/splits/t"):
        opened(train, folder / "splits", tmp_path, *given)
    (tmp_path / "mixed").mkdir()
    for name in ("table.parquet", "lines.jsonl"):
        (tmp_path / "mixed" / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(train.settings.TrainError, match="holds JSON lines and Parquet: --data-format says which"):
        opened(train, tmp_path / "mixed", tmp_path, *given)
    tokens = opened(train, tmp_path / "mixed", tmp_path, *given, "--data-format", "parquet")
    assert tokens.read(0, tokens.count).tolist() == tokens_of(tokenizer, DOCUMENTS)[0]


def test_tokenizers_of_other_models(train: Any, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(train.settings.TrainError, match=r"there is no tokenizer\.json"):
        opened(train, folder / "lines.jsonl", tmp_path, "--tokenizer", str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(train.settings.TrainError, match=r"tokenizer\.json is no tokenizer"):
        opened(train, folder / "lines.jsonl", tmp_path, "--tokenizer", str(tmp_path))


def test_a_small_vocabulary(folder: Path, tmp_path: Path) -> None:
    with program(tmp_path / "program", 97) as small:
        for given, message in (
            (["--tokenizer", str(folder / "tokenizer")], "has 352 tokens, and the model 97: it is another model's"),
            (["--data-format", "bytes"], "is read as bytes, and the model has a vocabulary of 97"),
        ):
            with pytest.raises(small.settings.TrainError, match=message):
                opened(small, folder / "lines.jsonl", tmp_path, *given)


@pytest.mark.parametrize("package", ["pyarrow", "tokenizers"])
def test_packages_that_only_some_data_need(
    train: Any, folder: Path, tmp_path: Path, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token files need none of them; where one is missing, its name is said."""
    for module in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, package, None)
    given = ["--tokenizer", str(folder / "tokenizer")]
    with pytest.raises(train.settings.TrainError, match=f"needs the package {package}") as error:
        opened(train, folder / "table.parquet", tmp_path, *given)
    assert error.value.code == 2
    np.save(tmp_path / "ids.npy", np.arange(9))
    assert opened(train, tmp_path / "ids.npy", tmp_path).count == 9


def test_bad_options(train: Any, tmp_path: Path) -> None:
    for given, message in (
        (["--data-format", "csv"], "--data-format csv is none of auto, tokens"),
        (["--dtype", "float32"], "--dtype float32 is none of uint8"),
    ):
        with pytest.raises(train.settings.TrainError, match=message):
            settings_of(train, tmp_path, tmp_path, *given)


def test_streams_do_not_end_a_machine(train: Any, folder: Path, tmp_path: Path) -> None:
    """Devices, files that were never written, lines without an end."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    with (tmp_path / "sparse.jsonl").open("wb") as file:
        file.write(b'{"text": "a"}\n')
        file.truncate(1 << 40)
    with gzip.open(tmp_path / "line.jsonl.gz", "wb", compresslevel=1) as file:
        for _ in range(80):
            file.write(bytes(1 << 20))
    for path, message in (
        (Path("/dev/zero"), "is not a regular file"),
        (tmp_path / "pipe.jsonl", "is not a regular file"),
        (tmp_path / "sparse.jsonl", "has a hole from byte 4096 on, and is no text"),
        (tmp_path / "line.jsonl.gz", "row 1: longer than 64 MiB"),
    ):
        with pytest.raises(train.settings.TrainError, match=message):
            opened(train, path, tmp_path, "--tokenizer", str(folder / "tokenizer"))


def test_what_unpacks_to_far_more_than_it_is(
    train: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train.documents, "MOST_LINE", 1 << 12)
    (tmp_path / "bomb.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' + b" " * 1000 + b"\n" * 999_999))
    with pytest.raises(train.settings.TrainError, match="unpacks to more than 200 times its size"):
        opened(train, tmp_path / "bomb.jsonl.gz", tmp_path, "--tokenizer", str(folder / "tokenizer"))
