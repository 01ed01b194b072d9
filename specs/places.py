"""Where a value stands: the one interface through which the reader locates what it complains about."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Protocol

from n3c.ir.diagnostics import Span

Path = tuple[str | int, ...]
"""Keys and array indexes from the root: `("quantization", "rules", 0, "format")`."""


def dotted(path: Path) -> str:
    """Return the text form of a path, as `Spec.spans` and `--set` use it."""
    return ".".join(str(part) for part in path)


_SHOWN = 200
"""Columns of a source line that messages show; a place further right is named only."""


class Places(Protocol):
    """Spans of a document. A path that the document does not spell out gives its nearest parent's."""

    def key(self, path: Path) -> Span | None:
        """Return the place of the key (or table header, or array entry) at `path`."""
        ...

    def value(self, path: Path) -> Span | None:
        """Return the place of the value at `path`."""
        ...

    def inside(self, path: Path, offset: int, length: int) -> Span | None:
        """Return the place of characters `offset` to `offset + length` of the string at `path`."""
        ...


class Text:
    """A text with its name; turns offsets into spans."""

    def __init__(self, text: str, file: str) -> None:
        self.text = text
        self.file = file
        self._starts = [0]
        position = text.find("\n")
        while position >= 0:
            self._starts.append(position + 1)
            position = text.find("\n", position + 1)

    def span(self, start: int, end: int) -> Span:
        """Return the span of `[start, end)`, cut at the end of its first line."""
        row = bisect_right(self._starts, start) - 1
        begin = self._starts[row]
        stop = self._starts[row + 1] - 1 if row + 1 < len(self._starts) else len(self.text)
        column = start - begin + 1
        length = max(1, min(end, stop, begin + _SHOWN) - start)
        source = self.text[begin : min(stop, begin + _SHOWN)] if column <= _SHOWN else None
        return Span(self.file, row + 1, column, length, source)

    def line_span(self, line: int, column: int) -> Span:
        """Return the one-character span at a line and column that count from 1."""
        row = min(max(line, 1), len(self._starts)) - 1
        return self.span(min(self._starts[row] + max(column, 1) - 1, len(self.text)), 0)


def shown(text: str) -> str:
    """Return `text` for a message, cut where it is long."""
    return text if len(text) <= 60 else text[:57] + "..."


def window(offsets: Sequence[int], offset: int, length: int) -> tuple[int, int]:
    """Return the document range of characters `offset` to `offset + length`, given each one's offset.

    `offsets` has one more entry than the string has characters: where the string ends.
    """
    start = offsets[min(offset, len(offsets) - 1)]
    end = offsets[min(offset + length, len(offsets) - 1)]
    return start, max(end, start + 1)
