"""`n3c check` of several specs and of standard input, its forms for machines, and warnings as errors."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from support.command import n3c, write_small
from support.specs import SMALL, SPECS

WARNED = ("MEM*E-ME", "MEM*EME")


def three(folder: Path) -> tuple[Path, Path, Path]:
    """Write a good spec, one with a warning, and one with an error in line 12."""
    good = write_small(folder)
    warned, wrong = folder / "warned.toml", folder / "wrong: a,b%.toml"
    warned.write_text(SMALL.lstrip().replace(*WARNED), encoding="utf-8")
    wrong.write_text(SMALL.lstrip().replace("state_size = 16", "state_siz = 16"), encoding="utf-8")
    return good, warned, wrong


def test_several_specs_are_all_checked_and_the_worst_decides(tmp_path: Path) -> None:
    good, warned, wrong = three(tmp_path)
    assert n3c("check", good, warned).code == 0
    result = n3c("check", wrong, good, warned)
    assert result.code == 3
    assert result.out.splitlines() == [
        f"{good}: ok (small), 8 layers: 3 M, 3 E, 1 *, 1 -",
        f"{warned}: ok (small), 7 layers: 3 M, 3 E, 1 *; 1 warning",
    ]
    assert n3c("check", wrong, tmp_path / "none.toml").code == 6
    data = n3c("check", wrong, good, "--json").data
    assert data["ok"] is False
    assert [(entry["file"], entry["ok"]) for entry in data["specs"]] == [(str(wrong), False), (str(good), True)]
    assert data["specs"][1]["layers"] == {"total": 8, "mamba": 3, "moe": 3, "attention": 1, "mlp": 1}


def test_what_no_spec_is_at_fault_for_is_told_once(tmp_path: Path) -> None:
    good, warned, _ = three(tmp_path)
    assert n3c("check", good, warned, "--sm", "many").err.count("error[E0701]") == 1


def test_warnings_as_errors(tmp_path: Path) -> None:
    good, warned, _ = three(tmp_path)
    assert n3c("check", good, "--warnings-as-errors").code == 0
    result = n3c("check", warned, "--warnings-as-errors", "--json")
    assert (result.code, result.data["ok"], result.codes) == (3, False, ["W0201"])
    assert n3c("check", warned, "--warnings-as-errors").out.startswith(f"{warned}: FAILED (small)")


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def piped(text: bytes, *arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
        result = n3c("check", "-", *arguments)
        return result.code, result.out + result.err

    assert piped(SMALL.encode()) == (0, "-: ok (small), 8 layers: 3 M, 3 E, 1 *, 1 -\n")
    assert piped(SMALL.encode(), "--set", "name=big") == (0, "-: ok (big), 8 layers: 3 M, 3 E, 1 *, 1 -\n")
    code, said = piped(b"schema = 1\nname = 3\n")
    assert (code, said.startswith("<stdin>:1:1: error")) == (3, True)
    code, said = piped(b"schema = \xff\n")
    assert (code, said.startswith("<stdin>:1:10: error[E0100]: not UTF-8")) == (3, True)


def test_github_annotations(tmp_path: Path) -> None:
    _, warned, wrong = three(tmp_path)
    result = n3c("check", warned, wrong, "--format", "github")
    assert (result.code, result.err) == (3, "")
    file = str(wrong).replace("%", "%25").replace(":", "%3A").replace(",", "%2C")
    warning, *errors = result.out.splitlines()
    assert warning.startswith(f"::warning file={warned},line=")
    message = "unknown key `state_siz` in [mamba]%0Adid you mean `state_size`?"
    assert f"::error file={file},line=12,col=1,endColumn=10,title=E0102::{message}" in errors


def test_sarif(tmp_path: Path) -> None:
    _, warned, wrong = three(tmp_path)
    result = n3c("check", warned, wrong, "--format", "sarif")
    assert (result.code, result.err) == (3, "")
    (run,) = result.data["runs"]
    levels = {found["ruleId"]: found["level"] for found in run["results"]}
    assert levels == {"W0201": "warning", "E0102": "error", "E0104": "error"}
    assert {rule["id"] for rule in run["tool"]["driver"]["rules"]} == set(levels)
    unknown = next(found for found in run["results"] if found["ruleId"] == "E0102")
    place = unknown["locations"][0]["physicalLocation"]
    assert place["artifactLocation"]["uri"].endswith("/wrong%3A%20a%2Cb%25.toml")
    assert place["region"] == {"startLine": 12, "startColumn": 1, "endColumn": 10}
    assert n3c("check", SPECS / "tiny.toml", "--format", "sarif").data["runs"][0]["results"] == []


def test_one_form_at_a_time(tmp_path: Path) -> None:
    assert n3c("check", write_small(tmp_path), "--json", "--format", "sarif").codes == ["E0701"]


def test_a_pattern_mistake_is_shown(tmp_path: Path) -> None:
    spec = write_small(tmp_path, ('"MEM*E-ME"', '"(ME-)*4"'))
    result = n3c("check", spec)
    assert result.out == f"{spec}: ok (small), 7 layers: 1 M, 1 E, 4 *, 1 -; 1 warning\n"
    assert "warning[W0202]: `pattern`: `*4` is 4 attention blocks, not a repetition" in result.err


def test_json_of_what_cannot_be_read_is_as_of_any_command(tmp_path: Path) -> None:
    result = n3c("check", tmp_path / "none.toml", "--json")
    assert (result.code, json.loads(result.out)["ok"], result.codes) == (6, False, ["E0601"])
