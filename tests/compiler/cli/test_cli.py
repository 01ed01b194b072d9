"""The command line itself: what loads, what goes to which stream, spellings, exit codes."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from n3c.compiler.building.judged import Judged
from n3c.compiler.cli import main as cli
from n3c.ir.diagnostics import Diagnostic
from support.command import PROGRAM, n3c, n3c_program, write_small
from support.specs import QUANTIZED, SPECS

HEAVY = {"torch", "numpy", "onnx", "onnx_ir", "tensorrt_rtx", "tensorrt", "rich", "jinja2", "ml_dtypes", "safetensors",
         "transformers"}  # fmt: skip

LOADED = """
import sys
from n3c.compiler.cli.main import run
code = run(sys.argv[1:])
print("LOADED", *{name.partition(".")[0] for name in sys.modules}, file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["check", SPECS / "super.toml"],
        ["check", SPECS / "super.toml", "--json", "--set", "moe.top_k=8"],
        ["check", SPECS / "missing.toml"],
        ["inspect", SPECS / "super.toml"],
        ["--help"],
        ["build", "--help"],
        ["passes"],
        ["schema"],
        ["doctor"],
        ["export-config", SPECS / "super.toml"],
    ],
    ids=lambda arguments: " ".join(getattr(a, "name", str(a)) for a in arguments),
)
def test_light_commands_load_nothing_heavy(arguments: list[object]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOADED, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False
    )
    loaded = set(done.stderr.rpartition("LOADED ")[2].split())
    assert "click" in loaded
    shows_a_table = arguments[0] in ("inspect", "doctor")
    assert not loaded & (HEAVY - {"rich"} if shows_a_table else HEAVY)


def test_commands_load_when_they_are_called() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import sys, n3c.compiler.cli.main; print(*sys.modules)"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    loaded = done.stdout.split()
    assert "n3c.compiler.cli.main" in loaded
    assert [name for name in loaded if name.startswith(("n3c.compiler.cli.commands", "n3c.specs", "n3c.passes"))] == []


def test_every_command_has_a_module_a_help_and_json() -> None:
    assert n3c("--help").code == 0
    modules = {path.stem for path in (Path(cli.__file__).parent / "commands").glob("[a-z]*.py")}
    assert modules == {cli.command_module(name) for name in cli.COMMANDS}
    for name, summary in cli.COMMANDS.items():
        assert summary in " ".join(n3c("--help").out.split())
        command = importlib.import_module(f"n3c.compiler.cli.commands.{cli.command_module(name)}").command
        assert isinstance(command, click.Command)
        options = {option for parameter in command.params for option in parameter.opts}
        assert {"--json", "--quiet", "--verbose", "--debug"} <= options
        assert n3c(name, "--help").out.startswith(f"Usage: n3c {name} ")


def test_version() -> None:
    assert n3c("--version").out == "n3c 0.1.0\n"


def test_no_command_shows_the_help_and_is_a_usage_error() -> None:
    result = n3c()
    assert (result.code, result.out) == (2, "")
    assert "  check  " in result.err


@pytest.mark.parametrize("arguments", [["frob"], ["--frob"], ["check"], ["schema", "a"], ["check", "--frob", "a"]])
def test_usage_errors(arguments: list[str]) -> None:
    result = n3c(*arguments)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error[E0701]: ")
    assert "--help`" in result.err
    result = n3c(*arguments, "--json")
    assert (result.code, list(result.data), result.codes) == (2, ["ok", "diagnostics"], ["E0701"])


def test_json_is_all_of_stdout(tmp_path: Path) -> None:
    spec = write_small(tmp_path)
    assert {"ok", "name", "sms", "forms", "diagnostics"} <= set(n3c("check", spec, "--json").data)
    built = n3c("build", spec, "--target", "torch", "-o", tmp_path / "out", "--json").data
    assert built["ok"] is True
    assert built["out"] == str(tmp_path / "out")
    assert all(list(file) == ["path", "bytes", "sha256"] for file in built["files"])
    assert built["seconds"] > 0
    assert built["peak_rss_bytes"] > 10_000_000
    assert not [found for found in built["diagnostics"] if found["severity"] == "error"]
    manifest = n3c("inspect", tmp_path / "out", "--json").data
    assert {"schema", "spec", "tools", "passes", "parameters", "ledger", "state_plan", "files"} <= set(manifest)
    assert manifest["files"] == built["files"]
    assert [entry["name"] for entry in manifest["passes"]] == [
        "quantize",
        "plan_state",
        "fuse_moe",
        "quantize_activations",
        "pack",
        "cleanup",
    ]
    assert list(manifest["passes"][0]) == ["name", "seconds", "changed"]
    assert list(manifest["ledger"][0]) == ["name", "role", "shape", "rule", "format", "bytes"]
    exported = n3c("export-config", spec, "--json").data
    assert exported["config"]["model_type"] == "nemotron_h"
    (tmp_path / "config.json").write_text(json.dumps(exported["config"]), encoding="utf-8")
    imported = n3c("import", tmp_path / "config.json", "--json").data
    assert "[model]" in imported["spec"]
    listed = n3c("passes", "--json").data
    assert listed["pipelines"]["serving"] == ["lower", *(entry["name"] for entry in manifest["passes"])]
    assert [entry["name"] for entry in listed["passes"]] == [*listed["pipelines"]["serving"], "widen"]
    assert all(entry["summary"] for entry in listed["passes"])
    assert n3c("schema", "--json").data == n3c("schema").data
    assert set(n3c("doctor", "--json").data) == {"machine", "gpus", "packages", "targets", "abilities", "extensions"}


def test_warnings_are_in_json_and_on_stderr(tmp_path: Path) -> None:
    spec = write_small(tmp_path, ("MEM*E-ME", "MEM*EME"))
    result = n3c("check", spec, "--json")
    assert (result.code, result.data["ok"]) == (0, True)
    assert [(d["code"], d["severity"]) for d in result.data["diagnostics"]] == [("W0201", "warning")]
    assert "warning[W0201]" in result.err
    assert n3c("check", spec).out == f"{spec}: ok (small), 7 layers: 3 M, 3 E, 1 *; 1 warning\n"


def test_snake_case_is_accepted(tmp_path: Path) -> None:
    spec = write_small(tmp_path)
    assert n3c("export_config", spec).out == n3c("export-config", spec).out != ""
    printed = []
    for flag, value in (("--print-ir-after", "fuse-moe"), ("--print_ir_after", "fuse_moe")):
        result = n3c("build", spec, "--target", "torch", "-o", tmp_path / "out", flag, value)
        assert result.code == 0
        printed.append(result.err[result.err.index("// after fuse_moe\n") :].partition("\n   ")[0])
    assert printed[0] == printed[1]


def test_print_ir_after_all_shows_every_stage_once(tmp_path: Path) -> None:
    spec = write_small(tmp_path, extra=QUANTIZED)
    result = n3c("build", spec, "--target", "torch", "-o", tmp_path / "out", "--print-ir-after", "all", "--json")
    assert result.data["ok"] is True
    headings = [line for line in result.err.splitlines() if line.startswith("// after ")]
    stages = ("lower", "quantize", "plan_state", "fuse_moe", "quantize_activations", "pack", "cleanup", "widen")
    assert headings == [f"// after {name}" for name in stages]


def test_overrides_reach_every_command(tmp_path: Path) -> None:
    spec = write_small(tmp_path)
    more = ("--set", "moe.num_experts=16", "--set", 'name="big"')
    assert n3c("check", spec, *more).out == f"{spec}: ok (big), 8 layers: 3 M, 3 E, 1 *, 1 -\n"
    assert n3c("inspect", spec, *more, "--json").data["name"] == "big"
    assert json.loads(n3c("export-config", spec, *more).out)["n_routed_experts"] == 16
    assert n3c("build", spec, *more, "--target", "torch", "-o", tmp_path / "out").code == 0
    assert "num_experts = 16" in (tmp_path / "out/spec.toml").read_text(encoding="utf-8")


def test_the_default_output_is_named_by_the_spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert n3c("build", write_small(tmp_path), "--target", "torch").code == 0
    assert (tmp_path / "build/small/torch/small/model.py").is_file()


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    for arguments in (["schema"], ["--help"], ["inspect", SPECS / "nano.toml"], ["check", tmp_path / "no", "--json"]):
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run(
            [*PROGRAM, *map(str, arguments)], stdout=write, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
        os.close(write)
        assert done.returncode == (6 if arguments[0] == "check" else 0)
        assert "Traceback" not in done.stderr
        assert "BrokenPipe" not in done.stderr


def test_nobody_listening_to_the_progress_is_no_error(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [*PROGRAM, "build", str(write_small(tmp_path)), "--target", "torch", "-o", str(tmp_path / "out")]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=write, timeout=60, check=False)
    os.close(write)
    assert done.returncode == 0
    assert (tmp_path / "out/torch/small/model.py").is_file()


@pytest.mark.parametrize(
    "line", ["schema", "simulate tiny --gpu L4 --rate 9 --prompt-tokens 9 --output-tokens 4 --requests 20"]
)
def test_a_full_stdout_is_a_file_error(line: str) -> None:
    """Whether a text or a table comes first."""
    with open("/dev/full", "w", encoding="utf-8") as full:  # noqa: PTH123
        done = subprocess.run([*PROGRAM, *line.split()], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (6, "error[E0615]: cannot write to stdout: No space left on device\n")


def test_a_terminal_without_the_characters_gets_the_rest() -> None:
    result = n3c_program("passes", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert result.code == 0
    assert "quantize" in result.out


def test_a_name_that_is_no_text_can_be_told(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/\xff.toml"
    done = subprocess.run([*map(os.fsencode, PROGRAM), b"check", name, b"--json"], capture_output=True, check=False)
    assert done.returncode == 6
    assert json.loads(done.stdout)["diagnostics"][0]["code"] == "E0601"


def test_a_fault_of_n3c_is_told_as_such_and_debug_shows_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("never")

    monkeypatch.setattr("n3c.compiler.building.checks.serve", broken)
    spec = write_small(tmp_path)
    result = n3c("check", spec, "--json")
    assert (result.code, result.codes) == (1, ["E0001"])
    assert "--debug" in result.err
    assert cli.run(["check", str(spec), "--debug"]) == 1
    assert "ZeroDivisionError: never\n" in capsys.readouterr().err
    assert cli.run(["check", str(tmp_path / "missing.toml"), "--debug"]) == 6
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.endswith(": No such file or directory\n")


def test_a_precision_that_is_not_realised_is_exit_code_5(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def emit_engines(*arguments: Any) -> Judged:
        folder = arguments[0].folder
        (folder / "trt").mkdir()
        (folder / "trt/audit.json").write_text("{}", encoding="utf-8")
        return Judged([Diagnostic("E0506", "`lm_head` is fp8 but the plan computes it as bf16")])

    monkeypatch.setattr("n3c.compiler.building.plans.emit_engines", emit_engines)
    spec, out = write_small(tmp_path), tmp_path / "out"
    result = n3c("build", spec, "--target", "trt", "-o", out, "--json")
    assert (result.code, result.data["ok"], result.codes) == (5, False, ["E0506"])
    assert {file["path"] for file in result.data["files"]} == {"spec.toml", "trt/audit.json"}
    text = n3c("build", spec, "--target", "trt", "-o", out)
    assert text.code == 5
    assert text.out.splitlines()[-1].startswith("FAILED: precision not realised: ")
    assert "error[E0506]" in text.err
    assert (out / "trt/audit.json").is_file()


def test_an_unforeseen_file_error_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError(24, "Too many open files", str(tmp_path))

    monkeypatch.setattr("n3c.compiler.building.checks.serve", broken)
    result = n3c("check", write_small(tmp_path), "--json")
    assert (result.code, result.codes) == (6, ["E0616"])
    assert result.data["diagnostics"][0]["file"] == str(tmp_path)
