"""Lines that people type: parsed as the command line parses them, or run by a shell that has n3c on its PATH."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import click

from n3c.compiler.cli.main import cli
from support.command import PROGRAM


def parse(line: str) -> click.Context:
    """Parse a line that begins with `n3c`, up to a redirection, without running it; click's exceptions if it is bad."""
    words = shlex.split(line.partition(" > ")[0], comments=True)
    assert words[0] == "n3c", line
    parent = click.Context(cli, info_name="n3c", **cli.context_settings)
    name, command, rest = cli.resolve_command(parent, words[1:])
    assert command is not None
    return command.make_context(name, rest, parent=parent)


def environment(folder: Path) -> dict[str, str]:
    """Return an environment whose PATH begins with `folder`/bin, made to hold `n3c` and `python` of this Python."""
    programs = folder / "bin"
    programs.mkdir()
    for name, words in (("n3c", PROGRAM), ("python", (sys.executable,))):
        path = programs / name
        path.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n', encoding="utf-8")
        path.chmod(0o755)
    return os.environ | {"PATH": os.pathsep.join([str(programs), os.environ["PATH"]])}
