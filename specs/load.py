"""Reading a spec: the file, TOML, `--set`, and then the reader. All errors at once, each with its place."""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path

from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError

from .files import read_stdin, read_text
from .overrides import apply_overrides
from .places import Text, dotted, shown
from .reader import MAX_RULES, read_spec
from .schema import Spec
from .shipped import STDIN, spec_file
from .toml_places import MAX_KEY_PARTS, TomlPlaces

MAX_SPEC_BYTES = 4 << 20
"""Largest spec; rules that name every expert of a 550B model take 2.7 MB."""
_DEEP_KEY = re.compile(
    r"""(?<![\w.-])(?:(?:[A-Za-z0-9_-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+)""" f"{{{MAX_KEY_PARTS}}}"
)
"""A dotted key for which tomllib would need memory and time by the square of its length."""

_TABLE = re.compile(r"^[ \t]*+\[", re.MULTILINE)
_MAX_TABLES = 4 * MAX_RULES
"""Of two tables with rules, and what else a spec has."""


def loaded(spec: str | Path | Spec, overrides: Sequence[str] = ()) -> tuple[Spec, list[Diagnostic]]:
    """Return the spec that a user gives, with `overrides` laid over it, and the warnings.

    It is given as such, by its path, by the name of a shipped one, or as `-` on standard input. Raises as `load_spec`.
    """
    if not isinstance(spec, Spec):
        return load_spec(spec_file(spec), overrides)
    if not overrides:
        return spec, []
    from .dump import dump_spec  # a file needs none

    return parse_spec(dump_spec(spec), spec.name, overrides)


def load_spec(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Spec, list[Diagnostic]]:
    """Load a spec file; return it with the warnings.

    `overrides` are `--set` arguments, as `moe.top_k=8`. Raises N3CError with every error found: exit code SPEC for a
    spec that is invalid, TARGET for a broken extension, FILE for a file that cannot be read, USAGE for an override
    that is none.
    """
    if str(path) == STDIN:
        return parse_spec(read_stdin(MAX_SPEC_BYTES), "<stdin>", overrides)
    return parse_spec(read_text(Path(path), MAX_SPEC_BYTES), str(path), overrides)


def parse_spec(text: str, file: str, overrides: Sequence[str] = ()) -> tuple[Spec, list[Diagnostic]]:
    """Parse the text of a spec; `file` is its name in messages. Raises as `load_spec`."""
    source = Text(text.removeprefix("\ufeff").replace("\r\n", "\n"), file)
    raw = _parse_toml(source)
    places, texts = apply_overrides(raw, TomlPlaces(source), overrides)
    spec, found = read_spec(raw, places, source.span(0, 0), texts)
    if spec is None:
        broken = any(diagnostic.code == "E0521" for diagnostic in found)
        raise N3CError(found, ExitCode.TARGET if broken else ExitCode.SPEC)
    return spec, found


def _parse_toml(source: Text) -> dict[str, object]:
    deep = _DEEP_KEY.search(source.text)
    if deep is not None:
        raise N3CError(Diagnostic("E0101", "nested too deeply", source.span(*deep.span())), ExitCode.SPEC)
    beyond = next(itertools.islice(_TABLE.finditer(source.text), _MAX_TABLES, None), None)
    if beyond is not None:
        message = f"more than {_MAX_TABLES} tables and rules"
        raise N3CError(Diagnostic("E0106", message, source.span(*beyond.span())), ExitCode.SPEC)
    try:
        return tomllib.loads(source.text)
    except tomllib.TOMLDecodeError as error:
        raise N3CError(_syntax_error(str(error), source), ExitCode.SPEC) from None
    except RecursionError:
        raise N3CError(Diagnostic("E0101", "nested too deeply", source.span(0, 0)), ExitCode.SPEC) from None
    except ValueError:  # a number too long for int(); the TOML itself is fine
        found = re.search(r"[0-9_]{4000,}", source.text)
        span = source.span(*found.span()) if found else source.span(0, 0)
        raise N3CError(Diagnostic("E0106", "a number of thousands of digits", span), ExitCode.SPEC) from None


def _syntax_error(message: str, source: Text) -> Diagnostic:
    """Locate tomllib's message; its `(at line 3, column 6)` or `(at end of document)` becomes the span."""
    reason, _, place = message.rpartition(" (at ")
    numbers = re.findall(r"\d+", place)
    if len(numbers) == 2:
        span = source.line_span(int(numbers[0]), int(numbers[1]))
    else:
        span = source.span(len(source.text.rstrip()), 0)
    duplicate = TomlPlaces(source).duplicate if reason.startswith("Cannot") else None
    if duplicate is not None:
        path, span, before = duplicate
        name = shown(dotted(path))
        return Diagnostic("E0103", f"`{name}` is given twice", span, help=f"the first is in line {before.line}")
    return Diagnostic("E0101", f"not TOML: {shown(reason[:1].lower() + reason[1:])}", span, help=_toml_help(reason))


def _toml_help(reason: str) -> str | None:
    if reason == "Invalid value":
        return "text stands in quotes, true and false are written small"
    return None
