"""Running the command line: in this process for most tests, as a program of its own where signals or streams matter."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from n3c.compiler.cli.main import run
from support.specs import SMALL

PROGRAM = (sys.executable, "-c", "from n3c.compiler.cli.main import main; main()")
"""The command that the installed `n3c` script runs."""


@dataclass(frozen=True, slots=True)
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> dict[str, Any]:
        """The one JSON object that stdout must be."""
        data = json.loads(self.out)
        assert isinstance(data, dict)
        return data

    @property
    def codes(self) -> list[str]:
        """The codes of the diagnostics of a `--json` run."""
        return [diagnostic["code"] for diagnostic in self.data["diagnostics"]]


def n3c(*arguments: object) -> Result:
    """Run a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([str(argument) for argument in arguments])
    assert "Traceback" not in err.getvalue(), err.getvalue()
    return Result(code, out.getvalue(), err.getvalue())


def n3c_shown(*arguments: object) -> str:
    """Run a command in this process, and return what a terminal would show: both streams, in the order of writing."""
    both = io.StringIO()
    with contextlib.redirect_stdout(both), contextlib.redirect_stderr(both):
        run([str(argument) for argument in arguments])
    return both.getvalue()


def default_signals() -> None:
    """Let signals end a program that is started (`preexec_fn`), also where the tests' own shell ignores them.

    A program inherits what is ignored: SIGHUP under nohup, SIGINT in the background of a shell.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def n3c_program(*arguments: object, before: Callable[[], None] | None = None, **environment: str) -> Result:
    """Run a command as a program; `before` is called in it first."""
    done = subprocess.run(
        [*PROGRAM, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=before,
        env=os.environ | environment,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return Result(done.returncode, done.stdout, done.stderr)


def write_small(folder: Path, *changes: tuple[str, str], extra: str = "") -> Path:
    """Write the spec `SMALL`, with pieces replaced and tables added, and return its path."""
    text = SMALL
    for old, new in changes:
        assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in SMALL"
        text = text.replace(old, new)
    path = folder / "small.toml"
    path.write_text(text.lstrip() + extra, encoding="utf-8")
    return path


def tree(folder: Path) -> dict[str, bytes]:
    """Return every file below `folder`, hidden ones too: relative path → content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
