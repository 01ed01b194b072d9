"""What stands beside exported weights: small files of the checkpoint before, the card, the record."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from n3c.runtime import verify

from .generated import generate, imported, tiny_spec, write_generated

SMALL = {
    "tokenizer.json": b'{"a": 1}',
    "chat_template.jinja": b"{{ messages }}",
    "generation_config.json": b'{"do_sample": true}',
}


def train(folder: Path, out: Path, *options: str) -> str:
    arguments = [
        "--data",
        str(folder / "text"),
        "--out",
        str(out),
        "--steps",
        "2",
        "--batch-size",
        "2",
        "--seq-len",
        "8",
    ]
    said = io.StringIO()
    with imported(folder) as program, contextlib.redirect_stderr(said):
        code = program.train.main([*arguments, "--val-every", "0", *options])
    assert code == 0, said.getvalue()
    return said.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the package, train.py, a text, and a checkpoint to start from."""
    folder = tmp_path_factory.mktemp("card")
    spec = tiny_spec("E", mtp=None)
    spec = replace(spec, model=replace(spec.model, vocab_size=256))
    write_generated(spec, folder)
    (folder / "text").write_bytes(bytes(range(256)) * 4)
    module = generate(spec)
    module.save_checkpoint(module.Model(), folder / "start")
    for name, data in SMALL.items():
        (folder / "start" / name).write_bytes(data)
    (folder / "start/merges.txt").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    (folder / "start/preprocessor_config.json").write_text("{}")
    return folder


def test_small_files_of_the_checkpoint_are_carried(folder: Path, tmp_path: Path) -> None:
    said = train(folder, tmp_path / "run", "--weights", str(folder / "start"))
    found = {path.name: path.read_bytes() for path in (tmp_path / "run/export").iterdir()}
    written = {"config.json", "model.safetensors", "README.md", "n3c_record.json"}
    assert found.keys() == written | SMALL.keys()
    assert {name: found[name] for name in SMALL} == SMALL
    assert "not exported: merges.txt of --weights is a Git LFS pointer, not the file" in said
    record = json.loads(found["n3c_record.json"])
    assert [row["path"] for row in record["source"]["files"]] == sorted(
        SMALL.keys() | {"config.json", "merges.txt", "model.safetensors", "preprocessor_config.json"}
    )


def test_the_record_tells_the_run_and_what_it_gave(folder: Path, tmp_path: Path) -> None:
    """Files and counts are those of the folder; nothing depends on the place or the hour."""
    for run in ("first", "second"):
        train(folder, tmp_path / run / "run", "--export-dtype", "bfloat16", "--no-async-checkpoints")
    first, second = (tmp_path / run / "run/export" for run in ("first", "second"))
    for name in ("README.md", "n3c_record.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
        assert str(tmp_path).encode() not in (first / name).read_bytes()
    record: dict[str, Any] = json.loads((first / "n3c_record.json").read_text())
    assert record["command"][:7] == ["train.py", "--data", "text", "--out", "run", "--steps", "2"]
    assert {"--export-dtype", "--no-async-checkpoints"} <= set(record["command"])
    assert record["source"] is None
    assert {name: entry["weights"] for name, entry in record["formats"].items()} == {"bf16": 25, "f32": 1}
    assert verify(first).ok
    model = generate(
        replace(tiny_spec("E", mtp=None), model=replace(tiny_spec("E", mtp=None).model, vocab_size=256))
    ).Model()
    assert record["tensors"] == {"count": 26, "bytes": sum(entry["bytes"] for entry in record["formats"].values())}
    assert record["weights"]["count"] == 26
    stored = load_file(first / "model.safetensors").values()
    assert record["tensors"]["bytes"] == sum(tensor.numel() * tensor.itemsize for tensor in stored)
    assert record["weights"]["elements"] == sum(tensor.numel() for tensor in model.state_dict().values())
    for row in record["files"]:
        data = (first / row["path"]).read_bytes()
        assert (row["bytes"], row["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert {row["path"] for row in record["files"]} == {"config.json", "model.safetensors"}
    assert "Trained for 2 steps from fresh weights" in (first / "README.md").read_text()
