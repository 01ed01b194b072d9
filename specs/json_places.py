"""Where each key and value of a JSON text stands, and which spec key each one became."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from copy import copy
from typing import cast

from n3c.ir import json_file
from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError, Span
from n3c.ir.json_file import DuplicateKeyError, JsonError, JsonSyntaxError

from .places import Path, Text, shown

MAX_VALUES = 1 << 20
"""Most values of a config, with whose places they take 550 MB; one that names every expert of a 550B model has half."""

_TOKEN = re.compile(r'\s*([{}\[\]:,]|"(?:[^"\\]|\\.)*"|[^\s{}\[\]:,"]+)')


class JsonPlaces:
    """Spans of a JSON text, by JSON path; with `names`, by spec path (see `Places`)."""

    def __init__(self, text: Text) -> None:
        self.text = text
        self.start = text.span(0, 0)
        self.names: dict[Path, Path] = {}
        """Spec path → JSON path. A spec path below one of these is at the same place below its JSON path."""
        self.duplicate: tuple[str, Span] | None = None
        self._entries: dict[Path, tuple[tuple[int, int], tuple[int, int]]] = {}
        self._root: Path = ()
        self._scan()

    def below(self, key: str) -> JsonPlaces:
        """Return the places of the object at `key`, whose JSON paths begin there."""
        inner = copy(self)
        inner.names, inner._root = {}, (*self._root, key)
        inner.start = inner._at((), 0)
        return inner

    def json_key(self, *path: str | int) -> Span:
        """Return the place of the key at a JSON path, or of its nearest parent."""
        return self._at(path, 0)

    def json_value(self, *path: str | int) -> Span:
        """Return the place of the value at a JSON path, or of its nearest parent."""
        return self._at(path, 1)

    def key(self, path: Path) -> Span:
        return self._at(self._json_path(path), 0)

    def value(self, path: Path) -> Span:
        return self._at(self._json_path(path), 1)

    def inside(self, path: Path, offset: int, length: int) -> Span:
        return self.json_inside(self._json_path(path), offset, length)

    def json_inside(self, path: Path, offset: int, length: int) -> Span:
        """Return the place of characters of a string, or of an entry of an array."""
        if (*self._root, *path, offset) in self._entries:
            return self._at((*path, offset), 1)
        start, end = self._entries.get((*self._root, *path), ((0, 0), (0, 0)))[1]
        raw = self.text.text[start:end]
        if not raw.startswith('"') or "\\" in raw:
            return self._at(path, 1)
        return self.text.span(start + 1 + offset, start + 1 + offset + length)

    def _json_path(self, path: Path) -> Path:
        for cut in range(len(path), 0, -1):
            if path[:cut] in self.names:
                return self.names[path[:cut]] + path[cut:]
        return ()

    def _at(self, path: Path, which: int) -> Span:
        path = (*self._root, *path)
        while path and path not in self._entries:
            path = path[:-1]
        return self.text.span(*self._entries[path][which]) if path else self.start

    def _scan(self) -> None:
        """Walk the tokens of text that the json module has accepted, or of such a text up to its first duplicate."""
        opened: list[tuple[Path, int]] = []  # what is open: its path, and the index in an array (-1: in an object)
        path: Path = ()
        key, index = (0, 0), -1
        expect_key = False
        for found in _TOKEN.finditer(self.text.text):
            token, start, end = found.group(1), found.start(1), found.end(1)
            at: Path = (*path, index) if index >= 0 else path
            if token in "{[":
                opened.append((path, index))
                self._entries[at] = ((key if index < 0 else (start, start + 1)), (start, start + 1))
                path, index = at, -1 if token == "{" else 0
                expect_key = token == "{"
            elif token in "}]":
                if not opened:
                    return
                path, index = opened.pop()
                if index < 0 and path:
                    path = path[:-1]
                expect_key = False
            elif token == ",":
                if index >= 0:
                    index += 1
                expect_key = index < 0
            elif token == ":":
                expect_key = False
            elif expect_key:
                name = str(json.loads(token)) if "\\" in token else token[1:-1]
                if (*path, name) in self._entries:  # behind it the text may be anything
                    self.duplicate = (name, self.text.span(start, end))
                    return
                path, key = (*path, name), (start, end)
            else:
                self._entries[at] = ((key if index < 0 else (start, end)), (start, end))
                if index < 0 and path:
                    path = path[:-1]


def parse_json(text: str, file: str) -> tuple[Mapping[str, object], JsonPlaces]:
    """Parse a JSON object; raises N3CError (SPEC), located, where the text is not one."""
    source = Text(text, file)
    try:
        parsed = json_file.parse_json(text, MAX_VALUES)
    except JsonSyntaxError as error:
        span = source.span(error.position, 0)
        raise N3CError(Diagnostic("E0301", f"not JSON: {shown(error.reason)}", span), ExitCode.SPEC) from None
    except DuplicateKeyError:
        name, span = JsonPlaces(source).duplicate or ("", source.span(0, 0))
        raise N3CError(Diagnostic("E0303", f"`{shown(name)}` is given twice", span), ExitCode.SPEC) from None
    except JsonError as error:
        raise N3CError(Diagnostic("E0301", f"not readable: {error}", source.span(0, 0)), ExitCode.SPEC) from None
    if not isinstance(parsed, dict):
        raise N3CError(Diagnostic("E0301", "not a JSON object", source.span(0, 0)), ExitCode.SPEC)
    return cast("dict[str, object]", parsed), JsonPlaces(source)
