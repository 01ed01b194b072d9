"""What somebody who has never seen n3c reads: helps, suggestions for what is mistyped, the next command."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from n3c.compiler.cli.command import Command
from n3c.compiler.cli.main import COMMANDS, cli
from support.command import n3c, write_small
from support.shell import parse

ROOT = Path(__file__).parents[3]


def command_of(name: str) -> Command:
    command = cli.get_command(click.Context(cli), name)
    assert isinstance(command, Command)
    return command


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_are_lines_of_this_command_that_parse(name: str) -> None:
    examples = command_of(name).examples
    assert examples
    for _, line in examples:
        for found in re.findall(r"n3c [^)]*", line):
            assert parse(found).info_name == name


@pytest.mark.parametrize("name", COMMANDS)
def test_a_help_fits_80_columns_and_has_every_option_once(name: str) -> None:
    text = n3c(name, "--help").out
    assert max(map(len, text.splitlines())) <= 80
    listed = re.findall(r"^  (?:-\w, )?(--[a-z-]+)", text, flags=re.MULTILINE)
    flags = [max(option.opts, key=len) for option in command_of(name).params if isinstance(option, click.Option)]
    assert sorted(listed) == sorted([*flags, "--help"])
    assert text.index("\nOptions of all commands:\n") < text.index("\nExamples:\n")
    for word in ("SPEC", "BUILD", "CHECKPOINT"):  # what may be given is explained
        assert (re.search(rf"\b{word}\b", text.splitlines()[0]) is None) or f"\n  {word} " in text


def test_an_example_that_does_not_parse_is_noticed() -> None:
    with pytest.raises(click.ClickException):
        parse("n3c check my-model.toml --targt trt")
    with pytest.raises(click.ClickException):
        parse("n3c chek my-model.toml")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("chekc super", "Did you mean 'check'?"),
        ("quantise --weights a -o b", "Did you mean 'quantize'?"),
        ("check super --taget trt", "'--target'"),
        ("run build/a --max-new-token 3", "'--max-new-tokens'"),
        ("build super --target trtt", "'torch', 'onnx', 'trt'"),
        ("check supr", "did you mean `super`?"),
        ("check super --set moe.topk=3", "did you mean"),
    ],
)
def test_what_is_mistyped_is_answered(typed: str, meant: str) -> None:
    result = n3c(*typed.split())
    assert result.code != 0
    assert meant in result.err


def suggested(text: str) -> list[str]:
    """Return the commands after `next:`, each of which must parse."""
    _, found, rest = text.partition("next: ")
    lines = [line.strip() for line in rest.splitlines()] if found else []
    for line in lines:
        parse(line)
    return lines


def test_each_command_tells_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert suggested(n3c("init", "my model.toml").err) == ["n3c check 'my model.toml'"]
    spec = write_small(tmp_path).name
    result = n3c("check", spec, "--set", "moe.top_k=2")
    assert "next" not in result.out
    assert suggested(result.err) == [
        f"n3c inspect {spec} --set moe.top_k=2",
        f"n3c build {spec} --target torch --set moe.top_k=2",
    ]
    built = n3c("build", spec, "--target", "torch", "-o", "out")
    assert suggested(built.err)[-2:] == ["n3c verify out", "n3c run out --weights DIR --prompt TEXT"]
    assert suggested(n3c("import", "out/torch/config.json", "-o", "again.toml").err) == ["n3c check again.toml"]
    assert suggested(n3c("inspect", spec).err)
    assert suggested(n3c("inspect", "out").err) == ["n3c verify out"]


@pytest.mark.parametrize("flag", ["--json", "--quiet", "-q"])
def test_programs_get_no_suggestion(flag: str, tmp_path: Path) -> None:
    result = n3c("check", write_small(tmp_path), flag)
    assert (result.code, result.err) == (0, "")


def test_a_spec_that_fails_or_has_no_name_gets_no_suggestion(tmp_path: Path) -> None:
    assert "next" not in n3c("check", write_small(tmp_path), "--set", "moe.top_k=99").err
    assert "next" not in n3c("check", "super", "tiny").err
    assert "next" not in n3c("check", "super", "--format", "github").err


def test_quiet_leaves_results_and_warnings(tmp_path: Path) -> None:
    spec = write_small(tmp_path, ("MEM*E-ME", "MEM*EME"))
    result = n3c("build", spec, "--target", "torch", "-o", tmp_path / "out", "--quiet")
    assert result.out.splitlines()[-1].startswith("ok: ")
    assert all("warning[W" in line for line in result.err.splitlines() if not line.startswith(" "))
    assert "warning[W0201]" in result.err


def test_verbose_tells_every_step_time_and_memory(tmp_path: Path) -> None:
    spec = write_small(tmp_path)
    told = n3c("build", spec, "--target", "onnx", "--entry", "decode", "-o", tmp_path / "out", "--verbose").err
    less = n3c("build", spec, "--target", "onnx", "--entry", "decode", "-o", tmp_path / "out").err
    steps = re.findall(r"^ +\d+\.\d s  emit decode\.b1: .+ \d+/(\d+)$", told, flags=re.MULTILINE)
    assert len(steps) == int(steps[0]) > len(re.findall("emit decode.b1: ", less))
    assert re.search(r"^\d+\.\d\d s, peak memory \d", told, flags=re.MULTILINE)
    assert "peak memory" not in less
    assert "peak memory" in n3c("inspect", tmp_path / "none.toml", "-v").err  # of what failed, too


def test_quiet_and_verbose_contradict_each_other() -> None:
    result = n3c("check", "super", "-q", "-v")
    assert (result.code, result.out) == (2, "")
    assert "--quiet and --verbose" in result.err


def test_the_pre_commit_hook_checks_what_it_is_given(tmp_path: Path) -> None:
    text = (ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8")
    keys = dict(re.findall(r"^[- ] (\w+): (.+)$", text, flags=re.MULTILINE))
    assert re.search(keys["files"], "specs/my-model.toml")
    assert re.search(keys["files"], "my-model.n3c.toml")
    assert not re.search(keys["files"], "pyproject.toml")
    words = keys["entry"].split()
    assert words[0] == "n3c"
    good, bad = write_small(tmp_path), tmp_path / "bad.toml"
    bad.write_text("schema = 2\n", encoding="utf-8")
    assert n3c(*words[1:], good).code == 0
    result = n3c(*words[1:], good, bad)
    assert result.code == 3
    assert f"{bad}:1:10: error[E0" in result.err
