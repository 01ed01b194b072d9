"""The README's first spec goes all the way: its commands are run as they stand, with a few steps of training."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from support.command import PROGRAM, n3c

ROOT = Path(__file__).parents[2]


def test_the_first_spec_goes_all_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## A first spec\n")[2].partition("\n## ")[0]
    (block,) = re.findall(r"^```\n(n3c .*?)^```$", section, flags=re.MULTILINE | re.DOTALL)
    commands = [shlex.split(line, comments=True) for line in block.splitlines()]
    assert {words[1] for words in commands} >= {"check", "build", "quantize", "verify", "run"}
    monkeypatch.chdir(tmp_path)
    Path("my-texts").mkdir()
    Path("my-texts/a.txt").write_text("The model says what it was told. " * 200, encoding="utf-8")
    assert n3c("init", "my-model.toml").code == 0
    for words in commands:
        if words[0] == "n3c":
            program = [*PROGRAM, *words[1:]]  # TensorRT-RTX builds a loop otherwise a second time in one process
        else:
            few = [re.sub("^200$", "4", word) for word in words[1:]]
            program = [sys.executable, *few, "--batch-size", "2", "--seq-len", "64"]
        done = subprocess.run(program, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, f"{' '.join(words)}\n{done.stderr}"
    assert Path("build/my-model/trt/decode.b1.plan").is_file()
