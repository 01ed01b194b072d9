"""Escaping of text for people: characters that a terminal would obey or reorder are spelled out."""

from __future__ import annotations


def escaped(text: str) -> str:
    r"""Return `text` on one line: control characters, bidirectional marks and the like as `\x1b`, `\n`, `\u202e`."""
    return text if text.isprintable() else "".join(map(_spelled, text))


def escaped_lines(text: str) -> str:
    """Return `text` with its lines and tabs, and all else as `escaped` gives it."""
    return "".join(c if c in "\n\t" else _spelled(c) for c in text)


def _spelled(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
