"""`--set moe.top_k=8`: values from the command line, laid over those of the file."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError, Span

from .places import Path, Places, Text, dotted, shown, window
from .toml_places import scan_string

FILE = "--set"
"""The file name in the place of a value from the command line."""


@dataclass(frozen=True, slots=True)
class _Override:
    text: Text
    path: Path
    start: int  # of the value; the key begins the text

    def key(self) -> Span:
        return self.text.span(0, self.start - 1)

    def value(self) -> Span:
        return self.text.span(self.start, len(self.text.text))


class _Overlay:
    """Places of the file, except for what an override gives."""

    def __init__(self, below: Places, overrides: Sequence[_Override]) -> None:
        self._below = below
        self._overrides = overrides

    def _find(self, path: Path) -> _Override | None:
        # The last override of `path` or of a table around it decides.
        for override in reversed(self._overrides):
            if path[: len(override.path)] == override.path:
                return override
        return None

    def _made(self, path: Path) -> _Override | None:
        """Return the override that made the table at `path`, where the file has none."""
        for override in self._overrides:
            if override.path[: len(path)] == path:
                return override
        return None

    def key(self, path: Path) -> Span | None:
        override = self._find(path)
        if override is not None:
            return override.key()
        below = self._below.key(path)
        made = self._made(path) if below is None else None
        return made.key() if made else below

    def value(self, path: Path) -> Span | None:
        override = self._find(path)
        if override is not None:
            return override.value()
        below = self._below.value(path)
        made = self._made(path) if below is None else None
        return made.key() if made else below

    def inside(self, path: Path, offset: int, length: int) -> Span | None:
        override = self._find(path)
        if override is None:
            return self._below.inside(path, offset, length)
        text = override.text
        if override.path == path and text.text[override.start :].startswith(('"', "'")):
            return text.span(*window(scan_string(text.text, override.start)[1], offset, length))
        if override.path == path:
            start = min(override.start + offset, len(text.text))
            return text.span(start, start + length)
        return override.value()


def apply_overrides(raw: dict[str, object], places: Places, overrides: Sequence[str]) -> tuple[Places, dict[Path, str]]:
    """Lay `key.path=value` texts over `raw`, in place, the last winning.

    A value is read as TOML, or else as the text itself. Array entries are named by their index.
    Returns the places of the result, and what was typed for each path. Raises N3CError: USAGE for
    a text without `=`, SPEC for a path that leads nowhere.
    """
    done: list[_Override] = []
    errors: list[Diagnostic] = []
    for given in overrides:
        name, equals, typed = given.partition("=")
        text = Text(given.replace("\n", " "), FILE)
        parts = [part.strip() for part in name.split(".")]
        if not equals or not all(parts):
            message = f"`{shown(given)}` sets nothing: write `--set table.key=value`"
            raise N3CError(Diagnostic("E0701", message, text.span(0, len(given))), ExitCode.USAGE)
        start = len(name) + 1 + len(typed) - len(typed.lstrip())
        problem, path = _put(raw, parts, _value(typed.strip()))
        if problem is None:
            done.append(_Override(text, path, start))
        else:
            errors.append(Diagnostic("E0114", problem[0], text.span(0, len(name)), help=problem[1]))
    if errors:
        raise N3CError(errors, ExitCode.SPEC)
    texts = {override.path: override.text.text[override.start :] for override in done}
    return (_Overlay(places, done) if done else places), texts


def _value(typed: str) -> object:
    if "\n" in typed:
        return typed
    try:
        parsed = tomllib.loads(f"value = {typed}")
    except (ValueError, RecursionError):
        return typed
    return parsed["value"]


def _put(raw: dict[str, object], parts: Sequence[str], value: object) -> tuple[tuple[str, str | None] | None, Path]:
    """Store `value` below `raw`; return (message, help) where the path leads nowhere, and the path."""
    reached: object = raw
    path: Path = ()
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(reached, dict):
            table = cast("dict[str, object]", cast("object", reached))
            path += (part,)
            if last:
                table[part] = value
            else:
                reached = table.setdefault(part, {})
        elif isinstance(reached, list):
            entries = cast("list[object]", reached)
            if not (part.isascii() and part.isdecimal()) or len(part) > 9 or int(part) >= len(entries):
                message = f"`{shown(dotted(path))}` has no entry `{shown(part)}`"
                return (message, f"it has entries 0 to {len(entries) - 1}" if entries else "it is empty"), path
            path += (int(part),)
            if last:
                entries[int(part)] = value
            else:
                reached = entries[int(part)]
        else:
            return (f"`{shown(dotted(path))}` is a value: it has no `{shown(part)}`", None), path
    return None, path
