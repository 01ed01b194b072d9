"""Completion in the shells that are installed: each gets the script, and completes a command, an option and a spec."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from support.command import n3c
from support.shell import environment

BASH = """
eval "$(n3c completion bash)"
COMP_WORDS=(n3c {words}) COMP_CWORD={last}
compopt() {{ :; }}
_n3c_completion n3c
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
ZSH = """
autoload -Uz compinit && compinit -u -D
eval "$(n3c completion zsh)"
(( $+_comps[n3c] )) || exit 1
words=(n3c {words}) CURRENT=$(({last} + 1))
_describe() {{ print -rl -- "${{(@P)3}}" }}
compadd() {{ print -rl -- "${{(@P)argv[-1]}}" }}
_path_files() {{ : }}
_n3c_completion
"""
FISH = """
n3c completion fish | source
complete --do-complete "n3c {words}"
"""
SHELLS = {"bash": BASH, "zsh": ZSH, "fish": FISH}


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_completes(shell: str, tmp_path: Path) -> None:
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed")
    variables = environment(tmp_path)
    for words, expected in (("che", "check"), ("build tiny --tar", "--target"), ("check sup", "super")):
        script = SHELLS[shell].format(words=words, last=len(words.split()))
        done = subprocess.run(
            [program, "-c", script],
            env=variables,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        offered = {line.split(":")[0].split("\t")[0] for line in done.stdout.split("\n")}
        assert expected in offered, done.stdout + done.stderr


def test_other_shells_are_refused() -> None:
    assert n3c("completion", "tcsh").code == 2
    assert set(n3c("completion", "bash", "--json").data) == {"shell", "script"}
