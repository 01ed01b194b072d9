"""The output of commands: one JSON object or text on stdout, everything else on stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TextIO

import click

from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError, Severity
from n3c.ir.text import escaped, escaped_lines

_COLORS = {Severity.ERROR: "red", Severity.WARNING: "yellow", Severity.NOTE: "cyan"}


def say(text: str, *, newline: bool = True) -> None:
    """Print a result on stdout, what a terminal would obey in it escaped; N3CError (exit code 6) where that fails.

    A reader that has left (`n3c inspect … | head`) is no error: the exit code is that of the work.
    """
    _say(escaped_lines(text), newline=newline)


def say_line(text: str) -> None:
    """Print one line on stdout as `say` does: a line end in a name begins no other."""
    say(escaped(text))


def say_generated(text: str, *, newline: bool = False) -> None:
    """Print what a model says: for a terminal escaped, elsewhere as it is. Raises what `say` raises."""
    _say(escaped_lines(text) if sys.stdout.isatty() else text, newline=newline)


def _say(text: str, *, newline: bool) -> None:
    try:
        sys.stdout.write(text + "\n" if newline else text)
        sys.stdout.flush()
    except BrokenPipeError:
        _discard(sys.stdout)
    except OSError as error:
        _discard(sys.stdout)
        message = f"cannot write to stdout: {error.strerror or error}"
        raise N3CError(Diagnostic("E0615", message), ExitCode.FILE) from error


def tell(text: str) -> None:
    """Print on stderr, what a terminal would obey escaped.

    Nothing that can be said there changes what a command does, so failing is ignored.
    """
    _tell(escaped_lines(text))


def remark(text: str) -> None:
    """Print on stderr, as `tell` does, what --quiet leaves out."""
    if not chosen("quiet"):
        tell(text)


def suggest(*commands: tuple[object, ...]) -> None:
    """Name on stderr the commands that people take next, each without `n3c`; not with --json or --quiet."""
    if chosen("quiet") or chosen("json"):
        return
    import shlex  # here, as `n3c check --quiet` starts faster without

    for i, words in enumerate(commands):
        command = " ".join(shlex.quote(str(word)) for word in words)
        _tell(f"{'' if i else 'next:':<5} n3c {escaped(command)}")


def keep(name: str) -> Callable[[click.Context, click.Parameter, bool], bool]:
    """Return the callback of a flag that `chosen` tells of while its command runs."""

    def kept(context: click.Context, _: click.Parameter, value: bool) -> bool:
        context.meta[f"n3c.{name}"] = value
        return value

    return kept


def chosen(name: str) -> bool:
    """Whether the running command has the flag `--name`, one of those that all commands have; not outside of one."""
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get(f"n3c.{name}"))


def _tell(text: str) -> None:
    try:
        click.echo(text, err=True, color=colored())
    except OSError:
        _discard(sys.stderr)


def _discard(stream: TextIO) -> None:
    """Send what is left in the buffer of `stream`, and all that follows, nowhere."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    except (OSError, ValueError):  # no file behind it, as in tests: nothing to save
        return


def print_json(data: Mapping[str, Any]) -> None:
    """Print one JSON object on stdout."""
    import json  # here, as `n3c check` starts faster without

    _say(json.dumps(data, indent=2), newline=True)  # which escapes everything but ASCII


def colored() -> bool:
    """Whether stderr shows colors: NO_COLOR says no, then FORCE_COLOR yes, then it must be a terminal, no dumb one."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or (sys.stderr.isatty() and os.environ.get("TERM") != "dumb")


def animated() -> bool:
    """Whether stderr is a terminal that somebody watches: no dumb one, and not the record of a CI."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("CI")


def print_diagnostics(diagnostics: Iterable[Diagnostic]) -> None:
    """Print diagnostics on stderr."""
    for diagnostic in diagnostics:
        text = diagnostic.render()
        if colored():
            head, newline, rest = text.partition("\n")
            text = click.style(head, fg=_COLORS[diagnostic.severity], bold=True) + newline + rest
        _tell(text)  # escaped by `render`


def print_failure(error: N3CError, as_json: bool) -> int:
    """Print what went wrong and return the exit code. With `as_json` stdout gets the fixed JSON form."""
    print_diagnostics(error.diagnostics)
    if as_json:
        print_json({"ok": False, "diagnostics": [d.as_json() for d in error.diagnostics]})
    return int(error.exit_code)
