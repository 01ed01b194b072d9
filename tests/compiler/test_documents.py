"""The documents of the command line against the program: they name the same things."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from n3c.compiler.cli.main import COMMANDS
from n3c.ir.diagnostics import ExitCode
from support.command import n3c, n3c_shown

ROOT = Path(__file__).parents[2]
COMMON = {"--json", "--quiet", "--verbose", "--debug", "--help"}
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
        options = set(re.findall(r"--[a-z-]+", n3c(name, "--help").out)) - COMMON
        assert options <= set(re.findall(r"--[a-z-]+", section)), name
    for code in ExitCode:
        assert f"| {code.value} |" in text


def test_every_path_in_the_documents_exists() -> None:
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    folders = "|".join((*FOLDERS, "tests", "benchmarks", "docs"))
    for document in documents:
        named = re.findall(rf"\b((?:{folders})/[\w./-]+\.(?:py|toml|md|jinja))\b", document.read_text(encoding="utf-8"))
        missing = [path for path in named if "NAME" not in path and not (ROOT / path).exists()]
        assert not missing, document.name


def test_every_long_file_has_a_reason_in_the_design() -> None:
    files = [path for folder in (*FOLDERS, "benchmarks") for path in (ROOT / folder).rglob("*")]
    sources = [path for path in files if path.suffix in (".py", ".jinja")]
    long = {path.relative_to(ROOT).as_posix() for path in sources if path.read_text(encoding="utf-8").count("\n") > 350}
    section = (
        (ROOT / "docs/design.md").read_text(encoding="utf-8").partition("\n## Long files\n")[2].partition("\n## ")[0]
    )
    assert set(re.findall(r"^\| `([^`]+)` \|", section, flags=re.MULTILINE)) == long


def test_the_examples_give_what_the_document_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "specs").symlink_to(ROOT / "specs")
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/command-line.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```console\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    examples = [example for block in blocks for example in re.split(r"^\$ n3c ", block, flags=re.MULTILINE)[1:]]
    assert len(examples) > 8
    for example in examples:
        command, _, expected = example.partition("\n")
        shown = re.sub(" +", " ", n3c_shown(*command.split()))
        assert re.fullmatch(_pattern(re.sub(" +", " ", expected)), shown), f"n3c {command}\n{shown}"


def test_the_examples_of_the_python_api_give_what_the_document_shows(tmp_path: Path) -> None:
    page = ROOT / "docs/python.md"
    assert len(re.findall(r"^>>> ", page.read_text(encoding="utf-8"), flags=re.MULTILINE)) > 30
    (tmp_path / "specs").symlink_to(ROOT / "specs")
    command = [sys.executable, "-m", "doctest", "-o", "FAIL_FAST", str(page)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def _pattern(expected: str) -> str:
    """Return a regular expression: a line of `…` alone is any number of lines, elsewhere it is a part of its line."""
    lines = ("(.*\n)*?" if line == "…\n" else re.escape(line).replace("…", ".*") for line in expected.splitlines(True))
    return "".join(lines)
