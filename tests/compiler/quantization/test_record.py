"""The record and the card of a quantized checkpoint: true, the same each time, deaf to hostile names."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from n3c.backends.modelopt.record import code
from n3c.compiler import import_config
from n3c.specs.dump import dump_spec
from support.checkpoints import policy_spec, write_checkpoint
from support.command import n3c

HOSTILE = "a`b``c</code><script>alert(1)<|x\n# title\x1b[31m\u202e"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("record") / "bf16"
    write_checkpoint(folder, policy_spec())
    (folder / "README.md").write_text("the card before")
    (folder / "chart.png").write_text(POINTER)
    return folder


@pytest.fixture(scope="module")
def made(source: Path) -> Path:
    out = source.with_name("out")
    command = ("--weights", source, "-o", out, "--search", "mse", "--set", "quantization.block=[1, 16]")
    result = n3c("quantize", *command, "--json")
    assert result.code == 0, result.err
    assert "`chart.png` is a Git LFS pointer" in next(
        item["message"] for item in result.data["diagnostics"] if item["code"] == "W0626"
    )
    return out


def record(folder: Path) -> dict[str, Any]:
    data = json.loads((folder / "n3c_record.json").read_text())
    assert isinstance(data, dict)
    return data


def test_the_record_is_what_the_checkpoint_holds(source: Path, made: Path) -> None:
    found = record(made)
    spec = import_config(made).spec
    assert (found["schema"], found["kind"], found["name"]) == (1, "quantized", "small")
    assert found["spec_sha256"] == hashlib.sha256(dump_spec(spec).encode()).hexdigest()
    assert found["command"] == [
        *("n3c", "quantize", "--weights", "bf16", "--search", "mse", "--set", "quantization.block=[1, 16]")
    ]
    with safe_open(made / "model.safetensors", framework="numpy") as file:
        assert found["tensors"]["count"] == len(file.keys())
    ledger = json.loads((made / "n3c_ledger.json").read_text())["weights"]
    assert found["weights"]["count"] == len(ledger)
    assert sum(entry["weights"] for entry in found["formats"].values()) == len(ledger)
    assert {entry["format"] for entry in found["errors"]} == {"w4a16_nvfp4", "fp8", "keep"}
    assert all((entry["relative_error"] > 0) == (entry["format"] != "keep") for entry in found["errors"])
    for folder, rows in ((made, found["files"]), (source, found["source"]["files"])):
        for row in rows:
            data = (folder / row["path"]).read_bytes()
            assert (row["bytes"], row["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert {row["path"] for row in found["files"]} == {path.name for path in made.iterdir()} - {
        *("README.md", "n3c_record.json")
    }
    assert (made / "README.source.md").read_text() == "the card before"
    assert not (made / "chart.png").exists()
    assert str(source.parent) not in (made / "n3c_record.json").read_text() + (made / "README.md").read_text()


def test_verify_and_inspect_read_the_record(made: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(made, copied)
    assert n3c("verify", copied).code == 0
    assert "every file is as recorded" in n3c("verify", copied).out
    assert n3c("verify", copied, "--weights", copied, "--json").codes == ["E0701"]
    config = (copied / "config.json").read_text()
    (copied / "config.json").write_text(config.replace("bfloat16", "bfloat17"))
    wrong = n3c("verify", copied, "--json")
    assert (wrong.code, wrong.codes) == (6, ["E0640"])
    assert "W0627" not in n3c("inspect", copied).err
    (copied / "tokenizer.json").unlink()
    assert "W0627]: `tokenizer.json` is missing, and n3c_record.json says 2 bytes" in n3c("inspect", copied).err


@pytest.mark.parametrize("text", ["plain", "`", "``a`", "", HOSTILE])
def test_a_code_span_cannot_be_left(text: str) -> None:
    """Its fence is longer than any run of backticks within, and it is one line."""
    span = code(text)
    fence = span[: len(span) - len(span.lstrip("`"))]
    inner = span.removeprefix(fence).removesuffix(fence)
    assert fence and fence not in inner and "\n" not in span and "\x1b" not in span and "\u202e" not in span
    assert span.isprintable()


def test_hostile_names_stay_text(source: Path, tmp_path: Path) -> None:
    named = tmp_path / HOSTILE.replace("/", "")
    shutil.copytree(source, named)
    out = tmp_path / "out"
    assert n3c("quantize", "--weights", named, "-o", out, "--set", f"name={'x' * 3}").code == 0
    card = (out / "README.md").read_text()
    assert record(out)["source"]["name"] == named.name
    assert "\n# title" not in card and "base_model" not in card
    assert card.count("<script>") == 2  # of the source's name and of the command, both in code spans
    command = shlex.join(["n3c", "quantize", "--weights", named.name, "--set", "name=xxx"])
    assert code(named.name) in card and code(command) in card
