"""The points of the Python code that a template writes down.

Jinja's marks are masked by as many characters; what is then a statement of Python is one of the template, and the
changes of the statement are those of the template.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from .points import MODULE, Change, Mutant, changes_of

_MARK = re.compile(r"\{\{.*?\}\}|\{%.*?%\}|\{#.*?#\}", re.DOTALL)
_LONGEST = 40  # lines of a statement


def mutants_of_template(root: Path, path: Path) -> list[Mutant]:
    """Return the mutants of a template, in its order."""
    name = path.relative_to(root).as_posix()
    text = path.read_text(encoding="utf-8")
    lines = _masked(text).splitlines(keepends=True)
    found: list[Mutant] = []
    for row, offset, changes in _statements(lines):
        function = _function_around(lines, row)
        for change in changes:
            moved = replace(change, start=change.start + offset, end=change.end + offset, function=function)
            found.append(Mutant(name, text.count("\n", 0, moved.start) + 1, moved))
    return found


def _masked(text: str) -> str:
    """Return the text with a name instead of each expression of Jinja, and spaces instead of its statements."""

    def mask(found: re.Match[str]) -> str:
        filler = "_" if found.group().startswith("{{") else " "
        return re.sub(r"[^\n]", filler, found.group())

    return _MARK.sub(mask, text)


def _statements(lines: list[str]) -> Iterator[tuple[int, int, list[Change]]]:
    """Yield row, offset and changes of each statement: of a compound one, its head."""
    row = offset = 0
    while row < len(lines):
        taken = 1
        indent = len(lines[row]) - len(lines[row].lstrip(" "))
        for count in range(1, min(_LONGEST, len(lines) - row) + 1) if lines[row].strip() else ():
            text = "".join(lines[row : row + count])[indent:]
            changes = _changes(text)
            if changes is not None:
                yield row, offset + indent, changes
                taken = count
                break
        offset += sum(map(len, lines[row : row + taken]))
        row += taken


def _changes(text: str) -> list[Change] | None:
    """Return the changes of a statement, or of the head of a compound one; None where the text is neither."""
    if text.startswith("elif "):
        text = "if   " + text[5:]
    body = " pass" if re.search(r":\s*(#.*)?$", text) else ""
    try:
        return [change for change in changes_of(re.sub(r"\s*(#[^\n]*)?$", "", text) + body) if change.end <= len(text)]
    except (SyntaxError, ValueError):
        return None


def _function_around(lines: list[str], row: int) -> str:
    """Return the name of the function whose body a line is in; `MODULE` where there is none."""
    indent = len(lines[row]) - len(lines[row].lstrip(" "))
    for line in reversed(lines[: row + 1]):
        found = re.match(r"( *)(def|class) (\w+)", line)
        if found and (line is lines[row] or len(found[1]) < indent):
            return found[3] if found[2] == "def" else MODULE
    return MODULE
