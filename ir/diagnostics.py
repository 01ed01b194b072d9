"""Errors with a place: every message to a user names a file, a line and a column.

A stage collects `Diagnostic`s and raises them together in one `N3CError`; only the command line
formats and exits (the practice of xDSL and openapi-python-client).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum

from .text import escaped


class ExitCode(IntEnum):
    """Exit codes of the command line, the same for every command."""

    OK = 0
    INTERNAL = 1
    USAGE = 2
    SPEC = 3
    """The spec is invalid."""
    TARGET = 4
    """Not possible on this target or this machine."""
    NUMERICS = 5
    """Numerics differ, or a requested precision was not realised."""
    FILE = 6
    """A checkpoint or file cannot be read or written, or is not what it should be."""


class Severity(Enum):
    """How serious a diagnostic is: only errors fail a command."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of one line: `line` and `column` count from 1, `length` is in characters."""

    file: str
    line: int = 1
    column: int = 1
    length: int = 1
    source: str | None = None
    """The text of the line, where there is one to show."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """One finding. Codes are `E` or `W` and four digits; `docs/diagnostics.md` lists them."""

    code: str
    message: str
    span: Span | None = None
    severity: Severity = Severity.ERROR
    help: str | None = None

    def render(self) -> str:
        """Return the text form: place, code, message, the line with carets, help; what is no text in them escaped."""
        head = f"{self.severity.value}[{self.code}]: {escaped(self.message)}"
        if self.span is None:
            lines = [head]
        else:
            lines = [f"{escaped(str(self.span))}: {head}"]
            if self.span.source is not None:
                lines += _pointed_at(self.span, self.span.source)
        if self.help is not None:
            lines.append(f"  help: {escaped(self.help)}")
        return "\n".join(lines)

    def as_json(self) -> dict[str, object]:
        """Return the fixed JSON form (`n3c check --json`, key `diagnostics`)."""
        span = self.span
        return {
            "file": span.file if span else None,
            "line": span.line if span else None,
            "column": span.column if span else None,
            "code": self.code,
            "severity": self.severity.value,
            "message": self.message,
            "help": self.help,
        }


def _pointed_at(span: Span, source: str) -> tuple[str, str]:
    """Return the line of a span and the carets below it."""
    start = span.column - 1
    marked = source[start : start + span.length]
    blank = "".join("\t" if c == "\t" else " " * len(escaped(c)) for c in source[:start])
    carets = "^" * max(1, span.length + len(escaped(marked)) - len(marked))
    line = "\t".join(map(escaped, source.split("\t")))
    return f"{span.line:>5} | {line}", f"      | {blank}{carets}"


class N3CError(Exception):
    """One or more diagnostics, and the exit code that they deserve."""

    def __init__(self, diagnostics: Diagnostic | Sequence[Diagnostic], exit_code: ExitCode) -> None:
        self.diagnostics = (diagnostics,) if isinstance(diagnostics, Diagnostic) else tuple(diagnostics)
        self.exit_code = exit_code
        super().__init__("\n".join(d.render() for d in self.diagnostics))


MOST_ALIKE = 3
"""Equal faults that are told one by one, and examples of more."""


def counted(
    code: str, one: str, many: str, things: Sequence[str], place: Span, help: str | None = None
) -> Iterator[Diagnostic]:
    """Yield an error for each of a few `things`, or one for all of many, with their number and three examples.

    `one` has a `{}` for a thing, `many` for the number. Thousands of equal lines say no more than that.
    """
    if len(things) <= MOST_ALIKE:
        for thing in things:
            yield Diagnostic(code, one.format(thing), place, help=help)
        return
    first, rest = ", ".join(things[:MOST_ALIKE]), len(things) - MOST_ALIKE
    yield Diagnostic(code, f"{many.format(f'{len(things):,}')}: {first} and {rest:,} more", place, help=help)


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """Return a help line that names the closest of `known`, or None where nothing is close."""
    import difflib  # only errors need it

    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean `{close[0]}`?" if close else None
