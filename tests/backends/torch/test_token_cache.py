"""Where train.py keeps tokens: by content, made once however many ask, bounded in bytes and memory."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from .data_files import DOCUMENTS, make_tokenizer, program, settings_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("program")


@pytest.fixture(scope="module")
def train(folder: Path) -> Iterator[Any]:
    with program(folder) as modules:
        yield modules


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    make_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "lines.jsonl").write_text("\n".join(json.dumps({"text": t, "body": t[:9]}) for t in DOCUMENTS))
    return tmp_path / "lines.jsonl"


def opened(train: Any, data: Path, *more: str) -> Any:
    """Return the tokens of --data, kept in the folder `kept` beside it."""
    given = ["--tokenizer", str(data.parent / "tokenizer"), "--token-cache", str(data.parent / "kept"), *more]
    return train.sources.open_tokens(data, settings_of(train, data, data.parent / "out", *given))


def entries(data: Path) -> list[str]:
    return sorted(path.name for path in (data.parent / "kept").iterdir() if path.is_dir())


def test_by_content(train: Any, lines: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever the tokens follow from makes another entry; a name or a time does not."""
    first = opened(train, lines)
    assert "making tokens of" in capsys.readouterr().err and entries(lines) == [first.content]
    os.utime(lines, (1, 1))
    again = opened(train, lines.rename(lines.with_name("other.jsonl")))
    assert again.content == first.content and capsys.readouterr().err == ""
    assert again.read(0, again.count).tolist() == first.read(0, first.count).tolist()
    data = lines.with_name("other.jsonl")
    contents = [
        first.content,
        opened(train, data, "--text-field", "body").content,
        opened(train, data, "--document-separator", "4").content,
        opened(train, data, "--data-format", "text").content,
    ]
    data.write_text(data.read_text().replace("quick", "slow!"))
    contents.append(opened(train, data).content)
    (data.parent / "tokenizer" / "tokenizer_config.json").unlink()  # which names what ends a document
    contents.append(opened(train, data).content)
    assert entries(data) == sorted(set(contents)) and len(set(contents)) == len(contents)


def test_made_once_by_threads_that_ask_together(train: Any, lines: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ThreadPoolExecutor(4) as pool:
        counts = {tokens.count for tokens in pool.map(partial(opened, train), [lines] * 4)}
    assert len(counts) == 1 and capsys.readouterr().err.count("making tokens of") == 1


def test_made_once_by_processes(folder: Path, lines: Path) -> None:
    """Under torchrun, as a run does it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(folder / "train.py"), "--data", str(lines), "--out", str(lines.parent / "out"), "--steps", "1"]
    command += ["--batch-size", "2", "--seq-len", "16", "--val-every", "0"]
    command += ["--tokenizer", str(lines.parent / "tokenizer"), "--token-cache", str(lines.parent / "kept")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("making tokens of") == 1 and len(entries(lines)) == 1
    assert result.stderr.count(f"{lines}: 1 file of JSON lines, 40 documents") == 1


def test_a_process_that_was_killed(train: Any, lines: Path) -> None:
    """What it left half done is made anew."""
    key = opened(train, lines).content
    whole = lines.parent / "kept" / key
    whole.rename(whole.with_name(f".{key}"))
    (whole.with_name(f".{key}") / "tokens").write_bytes(b"half")
    assert opened(train, lines).content == key and entries(lines) == [key]


def test_a_file_that_changes_meanwhile(train: Any, lines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows_of = train.sources.rows_of

    def changing(*arguments: Any) -> Iterator[Any]:
        for row in rows_of(*arguments):
            os.utime(lines, (1, 1))
            yield row

    monkeypatch.setattr(train.sources, "rows_of", changing)
    with pytest.raises(train.settings.TrainError, match="changed while it was read"):
        opened(train, lines)
    assert entries(lines) == []


def test_too_many_tokens(train: Any, lines: Path) -> None:
    with pytest.raises(train.settings.TrainError, match=r"more than 1e-06 GB of tokens for .*: --token-cache-gb"):
        opened(train, lines, "--token-cache-gb", "1e-6")
    assert entries(lines) == []


def test_what_was_not_used_for_longest_goes(train: Any, lines: Path) -> None:
    """Not before there is too much; never what has just been made; using it counts."""
    kept = lines.parent / "kept"
    keys = [opened(train, lines, "--document-separator", str(n)).content for n in range(5, 8)]
    for age, key in enumerate(keys):
        os.utime(kept / key, (1000 - age, 1000 - age))
    opened(train, lines, "--document-separator", "7")  # the oldest is used
    size = sum(file.stat().st_size for file in (kept / keys[0]).iterdir())
    last = opened(train, lines, "--document-separator", "8", "--token-cache-gb", str(2.5 * size / 1e9)).content
    assert entries(lines) == sorted([keys[2], last])


def test_entries_may_fill_the_limit_to_the_byte(train: Any, tmp_path: Path) -> None:
    for name, age in (("a", 1000), ("b", 2000), ("c", 3000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokens").write_bytes(bytes(500))
        os.utime(tmp_path / name, (age, age))
    train.token_cache.TokenCache(tmp_path, 1e-6).remove_old(tmp_path / "c")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["b", "c"]


def test_a_full_disk(train: Any, lines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(train.token_cache.TokenCache, "write", full)
    with pytest.raises(train.settings.TrainError, match="No space left on device") as error:
        opened(train, lines)
    assert error.value.code == 6 and entries(lines) == []


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux bounds it")
@pytest.mark.parametrize("form", [pytest.param("parquet", marks=pytest.mark.slow), "arrow"])
def test_values_that_do_not_fit_into_memory(folder: Path, lines: Path, tmp_path: Path, form: str) -> None:
    """A file of a few kB with a text of 128 MB is told, and no memory taken for it."""
    table = pa.table({"text": pa.array(["a " * (1 << 26)], type=pa.large_string())})
    data = tmp_path / f"bomb.{form}"
    if form == "parquet":
        pq.write_table(table, data, compression="zstd", use_dictionary=False)
    else:
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with pa.OSFile(str(data), "wb") as file, pa.ipc.new_file(file, table.schema, options=options) as writer:
            writer.write_table(table)
    assert data.stat().st_size < 1 << 15
    given = ["--data", str(data), "--out", str(tmp_path / "out"), "--steps", "1"]
    given += ["--tokenizer", str(tmp_path / "tokenizer")]
    program = "import sys, train, tiny_test.training.token_cache as cache; cache.MOST_MEMORY = 1 << 26; "
    command = [sys.executable, "-c", program + "sys.exit(train.main(sys.argv[1:]))", *given]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 6, result.stderr
    assert f"error: {data}, after row 0: " in result.stderr and "alloc" in result.stderr
