"""Models of one block kind, those without any state too, pass through check, inspect and build."""

from __future__ import annotations

from pathlib import Path

import pytest

from n3c.compiler import build, check, inspect
from support.command import n3c
from support.specs import SMALL


def spec_of(folder: Path, pattern: str, mtp: str | None) -> Path:
    """Write SMALL with another pattern; tables that it does not use are ignored with a warning."""
    text = SMALL.replace('"MEM*E-ME"', f'"{pattern}"').replace("[serving]", "[serving]\nbatch_sizes = [1]")
    text = text.replace('[mtp]\npattern = "*E"\ndepth = 2\n', f'[mtp]\npattern = "{mtp}"\ndepth = 1\n' if mtp else "")
    (folder / "spec.toml").write_text(text, encoding="utf-8")
    return folder / "spec.toml"


@pytest.mark.parametrize("mtp", [None, "E", "*"])
@pytest.mark.parametrize("pattern", ["E", "-", "E-", "M", "*"])
def test_every_command_takes_them(pattern: str, mtp: str | None, tmp_path: Path) -> None:
    spec = spec_of(tmp_path, pattern, mtp)
    stateless = set(pattern) <= {"E", "-"} and mtp != "*"
    most = {fit["gpu"]: fit["most_requests"] for fit in check(spec, context=8).as_json()["fits"]}
    assert (most["RTX 5060"] is None) == stateless
    figures = inspect(spec, context=8).as_json()
    assert figures["fits"][0]["most_requests"] == (None if stateless else most["RTX 5060"])
    assert figures["fits"][0]["longest_context"] == 64
    for target in ("torch", "onnx"):
        assert build(spec, target=target, output=tmp_path / target).files


def test_no_states_are_told_as_such(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, "E", None)
    for arguments in (("check", spec, "--context", 8), ("inspect", spec)):
        result = n3c(*arguments)
        assert result.code == 0
        assert " any " in result.out
