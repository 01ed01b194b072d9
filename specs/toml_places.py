"""Where each key and value of a TOML text stands: tomllib gives values without places.

The scanner reads text that tomllib has accepted (so it need not judge), or its good beginning, for
finding a duplicate that tomllib refuses. TOML 1.0, https://toml.io/en/v1.0.0.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from n3c.ir.diagnostics import Span

from .places import Path, Text, window

MAX_KEY_PARTS = 100
"""Most parts of a dotted key; those of specs have three."""


MAX_PLACES = 1 << 18
"""Places that are looked for, in the order of the text: rules that name every expert of a 550B model have 60,000."""


@dataclass(slots=True)
class _Entry:
    key: tuple[int, int]
    value: tuple[int, int]


class TomlPlaces:
    """Spans of a TOML text; see `Places`."""

    def __init__(self, text: Text) -> None:
        self._text = text
        self._entries: dict[Path, _Entry] = {}
        self.duplicate: tuple[Path, Span, Span] | None = None
        """The first key or table given twice: its path, its place, and where it was given before."""
        self._scan()

    def key(self, path: Path) -> Span | None:
        entry = self._nearest(path)
        return self._text.span(*entry.key) if entry else None

    def value(self, path: Path) -> Span | None:
        entry = self._nearest(path)
        return self._text.span(*entry.value) if entry else None

    def inside(self, path: Path, offset: int, length: int) -> Span | None:
        entry = self._entries.get(path)
        if entry is None or self._text.text[entry.value[0]] not in "\"'":
            return self.value(path)
        _, offsets = scan_string(self._text.text, entry.value[0])
        return self._text.span(*window(offsets, offset, length))

    def _nearest(self, path: Path) -> _Entry | None:
        while path and path not in self._entries:
            path = path[:-1]
        return self._entries.get(path)

    def _scan(self) -> None:
        try:
            self._document()
        except (ValueError, IndexError, RecursionError):  # it ends early, nests deeper than tomllib reads, or has more
            return

    def _document(self) -> None:
        text = self._text.text
        arrays: dict[Path, int] = {}
        headers: dict[Path, tuple[int, int]] = {}
        table: Path = ()
        position = _skip(text, 0)
        while position < len(text):
            if text[position] != "[":
                position = _skip(text, self._pair(position, table))
                continue
            start = position
            double = text.startswith("[[", position)
            keys, position = _key(text, position + (2 if double else 1))
            position = text.index("]", position) + (2 if double else 1)
            place = (start, position)
            table = ()
            for part in keys[:-1]:  # a header below an array of tables means its last table
                table += (part,)
                table += (arrays[table],) if table in arrays else ()
                self._entries.setdefault(table, _Entry(place, place))
            table += (keys[-1],)
            if double:
                arrays[table] = arrays.get(table, -1) + 1
                self._entries.setdefault(table, _Entry(place, place))
                table += (arrays[table],)
            elif table in headers:
                self._repeated(table, place, headers[table])
            else:
                headers[table] = place
            self._entries[table] = _Entry(place, place)
            position = _skip(text, position)

    def _pair(self, position: int, table: Path) -> int:
        """Scan `key = value` at `position` and return where it ends."""
        text = self._text.text
        keys, end = _key(text, position)
        place = (position, end)
        path = table
        for part in keys[:-1]:
            path += (part,)
            self._entries.setdefault(path, _Entry(place, place))
        path += (keys[-1],)
        if path in self._entries:
            self._repeated(path, place, self._entries[path].key)
        start = _blank(text, text.index("=", end) + 1)
        end = self._value(start, path)
        self._enter(path, _Entry(place, (start, end)))
        return end

    def _value(self, position: int, path: Path) -> int:
        text = self._text.text
        if text[position] in "\"'":
            return scan_string(text, position)[1][-1] + _quote(text, position)
        if text[position] == "[":
            index = 0
            position = _skip(text, position + 1)
            while text[position] != "]":
                end = self._value(position, (*path, index))
                self._enter((*path, index), _Entry((position, end), (position, end)))
                index += 1
                position = _skip(text, end)
                if text[position] == ",":
                    position = _skip(text, position + 1)
            return position + 1
        if text[position] == "{":
            position = _skip(text, position + 1)
            while text[position] != "}":
                position = _skip(text, self._pair(position, path))
                if text[position] == ",":
                    position = _skip(text, position + 1)
            return position + 1
        found = _SCALAR.match(text, position)
        return position + len(found.group().rstrip()) if found else position + 1

    def _enter(self, path: Path, entry: _Entry) -> None:
        if len(self._entries) > MAX_PLACES:
            raise ValueError("too many places")
        self._entries[path] = entry

    def _repeated(self, path: Path, place: tuple[int, int], before: tuple[int, int]) -> None:
        if self.duplicate is None:
            self.duplicate = (path, self._text.span(*place), self._text.span(*before))


_SCALAR = re.compile(r"[^,\]}#\n]+")
_SPACE = re.compile(r"(?:[ \t\n]+|#[^\n]*)*")
_BLANK = re.compile(r"[ \t]*")
_BARE = re.compile(r"[A-Za-z0-9_-]+")


def _skip(text: str, position: int) -> int:
    """Skip white space, newlines and comments."""
    found = _SPACE.match(text, position)
    return found.end() if found else position


def _blank(text: str, position: int) -> int:
    found = _BLANK.match(text, position)
    return found.end() if found else position


def _key(text: str, position: int) -> tuple[list[str], int]:
    """Scan a dotted key; return its parts and where its last part ends."""
    parts: list[str] = []
    while True:
        position = _blank(text, position)
        if text[position] in "\"'":
            value, offsets = scan_string(text, position)
            parts.append(value)
            position = offsets[-1] + 1
        else:
            found = _BARE.match(text, position)
            if found is None:
                raise IndexError(position)
            parts.append(found.group())
            position = found.end()
        after = _blank(text, position)
        if not text.startswith(".", after):
            return parts, position
        position = after + 1


def _quote(text: str, position: int) -> int:
    """Return how many quotes open (and close) the string at `position`."""
    return 3 if text.startswith(text[position] * 3, position) else 1


_ESCAPES = {"b": "\b", "t": "\t", "n": "\n", "f": "\f", "r": "\r", '"': '"', "\\": "\\"}


def scan_string(text: str, position: int) -> tuple[str, list[int]]:
    """Return the string at `position` and the offset of each of its characters, then of its end."""
    quote, width = text[position], _quote(text, position)
    position += width
    if width == 3 and text[position] == "\n":
        position += 1
    closing = quote * width
    characters: list[str] = []
    offsets: list[int] = []
    while True:
        if text.startswith(closing, position):
            extra = 0  # up to two quotes may stand directly before the closing three
            while width == 3 and text.startswith(quote, position + 3 + extra):
                extra += 1
            characters += quote * extra
            offsets += range(position, position + extra + 1)
            return "".join(characters), offsets
        start = position
        char = text[position]
        position += 1
        if char == "\\" and quote == '"':
            escape = text[position]
            position += 1
            if escape in "uU":
                digits = 4 if escape == "u" else 8
                char = chr(int(text[position : position + digits], 16))
                position += digits
            elif escape in _ESCAPES:
                char = _ESCAPES[escape]
            else:  # a backslash at the end of a line joins it with the next text
                while text[position] in " \t\n":
                    position += 1
                continue
        characters.append(char)
        offsets.append(start)
