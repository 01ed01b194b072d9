"""The documents of the command line against the program: they name the same things."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from n3c.compiler.cli.main import COMMANDS
from n3c.ir.diagnostics import ExitCode
from support.command import n3c

ROOT = Path(__file__).parents[2]
FOLDERS = ("ir", "specs", "passes", "backends", "runtime", "compiler")


def codes_in(texts: Iterable[str], pattern: str) -> list[str]:
    return [code for text in texts for code in re.findall(pattern, text, flags=re.MULTILINE)]


def test_every_diagnostic_is_documented_once_and_no_other() -> None:
    sources = [path.read_text(encoding="utf-8") for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    used = set(codes_in(sources, r'"([EW]\d{4})"'))
    documented = codes_in([(ROOT / "docs/diagnostics.md").read_text(encoding="utf-8")], r"^\| ([EW]\d{4}) \|")
    for severity in "EW":
        listed = [code for code in documented if code[0] == severity]
        assert listed == sorted(listed)
    assert len(documented) == len(set(documented))
    assert set(documented) == used


def test_every_command_exit_code_and_option_is_documented() -> None:
    text = (ROOT / "docs/command-line.md").read_text(encoding="utf-8")
    for name in COMMANDS:
        assert f"## n3c {name}\n" in text
        section = text.partition(f"## n3c {name}\n")[2].partition("\n## ")[0]
        options = set(re.findall(r"--[a-z-]+", n3c(name, "--help").out)) - {"--json", "--debug", "--help"}
        assert options <= set(re.findall(r"--[a-z-]+", section)), name
    for code in ExitCode:
        assert f"| {code.value} |" in text


def test_the_examples_give_what_the_document_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "specs").symlink_to(ROOT / "specs")
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/command-line.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```console\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    examples = [example for block in blocks for example in re.split(r"^\$ n3c ", block, flags=re.MULTILINE)[1:]]
    assert len(examples) > 8
    for example in examples:
        command, _, expected = example.partition("\n")
        result = n3c(*command.split())
        shown = re.sub(" +", " ", result.err + result.out)
        assert re.fullmatch(_pattern(re.sub(" +", " ", expected)), shown), f"n3c {command}\n{shown}"


def _pattern(expected: str) -> str:
    """Return a regular expression: a line of `…` alone is any number of lines, elsewhere it is a part of its line."""
    lines = ("(.*\n)*?" if line == "…\n" else re.escape(line).replace("…", ".*") for line in expected.splitlines(True))
    return "".join(lines)
