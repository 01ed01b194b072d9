"""Whatever names, files, options and messages hold, a terminal gets text: nothing that it obeys, no forged line."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from n3c.compiler.cli.main import COMMANDS
from n3c.compiler.cli.output import say_generated
from support.checkpoints import policy_spec, write_checkpoint
from support.command import Result, n3c, write_small

HOSTILE = "a\x1b]0;owned\x07\x1b[31m\u202e\u2066\x9b2J\x7f\u2028\nerror[E9999]: forged\r"
"""Title, color, bidirectional override and isolate, a C1 control, DEL, line separators."""
NAME = HOSTILE.replace("/", "")
"""As the name of a file."""


def shows_text_only(result: Result) -> Result:
    """Assert that neither stream has anything but printable characters, line ends and tabs, nor a line of ours."""
    for stream in (result.out, result.err):
        assert {c for c in stream if not (c.isprintable() or c in "\n\t")} == set()
        assert not any(line.startswith("error[E9999]") for line in stream.splitlines())
    return result


def both(code: int, *arguments: object) -> Result:
    """Run a command as text and with --json: text only in both. Return the first."""
    first = shows_text_only(n3c(*arguments))
    assert first.code == code, first.err
    second = shows_text_only(n3c(*arguments, "--json"))
    assert second.code == code
    assert isinstance(second.data, dict)
    return first


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    return write_small(tmp_path)


@pytest.mark.parametrize("command", list(COMMANDS))
def test_paths_and_options(command: str, spec: Path, tmp_path: Path) -> None:
    takes_nothing = command in ("passes", "schema", "doctor", "specs", "completion")
    outcome = shows_text_only(n3c(command, tmp_path / HOSTILE, "--json"))
    if command == "init":  # which writes a file of any name
        assert (outcome.code, (tmp_path / HOSTILE).is_file()) == (0, True)
    else:
        assert outcome.code == (2 if takes_nothing or command in ("build", "quantize", "run") else outcome.code) != 0
    for option in (f"--{HOSTILE}", "--json"):
        taken = command in ("check", "diff") and option == "--json"  # as a second spec
        assert shows_text_only(n3c(command, spec, option, HOSTILE)).code == (6 if taken else 2)


def test_commands_and_values(spec: Path, tmp_path: Path) -> None:
    both(2, HOSTILE)
    both(2, "check", spec, "--sm", HOSTILE)
    both(2, "check", spec, "--target", HOSTILE)
    both(2, "build", spec, "--target", "torch", "--entry", HOSTILE)
    both(2, "run", tmp_path, "--prompt-ids", HOSTILE)
    both(2, "check", spec, "--set", HOSTILE)
    both(3, "check", spec, "--set", f"moe.top_k='{HOSTILE}'")
    both(3, "inspect", spec, "--set", f"model.{HOSTILE}=1")
    (weights := tmp_path / "weights").mkdir()
    both(2, "quantize", "--weights", weights, "-o", tmp_path / "out", "--part", HOSTILE)
    both(2, "quantize", "--weights", weights, "-o", tmp_path / "out", "--fmt", HOSTILE)


@pytest.mark.parametrize(
    "text",
    [
        f"schema = 1\n# {HOSTILE}",
        f'"{json.dumps(HOSTILE)[1:-1]}" = 1',
        f"name = {json.dumps(HOSTILE)}",
        f"[model]\npattern = {json.dumps(HOSTILE)}",
        f"[[quantization.rules]]\nroles = [{json.dumps(HOSTILE)}]\nformat = 'bf16'",
        f"[[quantization.rules]]\nmodules = [{json.dumps(HOSTILE)}]\nformat = {json.dumps(HOSTILE)}",
        "name = '\u202e\u2066'",
    ],
)
def test_specs(text: str, tmp_path: Path) -> None:
    (tmp_path / "spec.toml").write_text(text, encoding="utf-8")
    for command in (["check"], ["inspect"], ["export-config"], ["build", "--target", "torch"]):
        both(3, command[0], tmp_path / "spec.toml", *command[1:])


def test_outputs_that_are_written_and_refused(spec: Path, tmp_path: Path) -> None:
    both(0, "build", spec, "--target", "torch", "-o", tmp_path / NAME)
    (tmp_path / NAME / NAME).touch()
    assert "E0611" in both(6, "build", spec, "--target", "torch", "-o", tmp_path / NAME).err
    (tmp_path / NAME / NAME).unlink()
    for command in ("inspect", "verify"):
        shows_text_only(n3c(command, tmp_path / NAME))
    shows_text_only(n3c("export-config", spec, "-o", tmp_path / f"{NAME}.json"))
    shows_text_only(n3c("import", tmp_path / f"{NAME}.json", "-o", tmp_path / f"{NAME}.toml"))
    both(0, "check", tmp_path / f"{NAME}.toml")


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": HOSTILE},
        {"model_type": "nemotron_h", HOSTILE: HOSTILE},
        {"model_type": "nemotron_h", "hybrid_override_pattern": HOSTILE},
    ],
)
def test_configs(config: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for command in ("import", "inspect"):
        both(3, command, tmp_path)


def test_manifests(spec: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert n3c("build", spec, "--target", "torch", "-o", out).code == 0
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    manifest["spec"] |= {"name": HOSTILE, "sha256": HOSTILE}
    manifest["files"].append({"path": HOSTILE, "bytes": 1, "sha256": "0" * 64})
    manifest["ledger"].append({"name": HOSTILE, "format": HOSTILE, "bytes": 1})
    (out / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert "\\x1b" in both(0, "inspect", out).out
    both(6, "verify", out)
    both(6, "run", out, "--weights", tmp_path, "--prompt", HOSTILE)
    (out / NAME).touch()
    shows_text_only(n3c("build", spec, "--target", "torch", "-o", out, "--json"))


def hostile_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": HOSTILE}}), encoding="utf-8")


def hostile_name(folder: Path) -> None:
    save_file({HOSTILE: torch.zeros(2)}, folder / "model.safetensors")


def hostile_dtype(folder: Path) -> None:
    header = json.dumps({"x": {"dtype": HOSTILE, "shape": [1], "data_offsets": [0, 1]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0")


def hostile_quantization(folder: Path) -> None:
    config = {"quantization": {"quant_algo": HOSTILE, "exclude_modules": [HOSTILE]}}
    (folder / "hf_quant_config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize("change", [hostile_index, hostile_name, hostile_dtype, hostile_quantization])
def test_checkpoints(change: Callable[[Path], None], tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", policy_spec(), shards=1)
    change(tmp_path / "model")
    spec = write_small(tmp_path)
    for command in (
        ["quantize", "--weights", tmp_path / "model", "-o", tmp_path / "quantized"],
        ["inspect", tmp_path / "model"],
        ["build", spec, "--target", "torch", "--weights", tmp_path / "model", "-o", tmp_path / "out"],
        ["import", tmp_path / "model"],
        ["quantize", "--weights", tmp_path / "model", "-o", tmp_path / "new", "--like", tmp_path / "model"],
    ):
        shows_text_only(n3c(*command))


class Terminal(io.StringIO):
    """A stdout that is one."""

    def isatty(self) -> bool:
        return True


def test_a_model_speaks_raw_to_files_and_escaped_to_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "tab\tline\n\x1b[2Jé\u202e"
    for stream, seen in ((io.StringIO(), said), (Terminal(), "tab\tline\n\\x1b[2Jé\\u202e")):
        monkeypatch.setattr(sys, "stdout", stream)
        say_generated(said)
        assert stream.getvalue() == seen
