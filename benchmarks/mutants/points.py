"""The points of Python code that a mutant changes, and what it has instead.

A point is a comparison, an arithmetic or a logical operator, a sign, a condition, a boolean or a number.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

OPERATORS: dict[type[ast.AST], tuple[str, str]] = {
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"), ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="), ast.In: ("in", "not in"), ast.NotIn: ("not in", "in"), ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"), ast.And: ("and", "or"), ast.Or: ("or", "and"), ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"), ast.FloorDiv: ("//", "*"), ast.Mod: ("%", "//"),
    ast.Pow: ("**", "*"),
}  # fmt: skip
"""Operator → how it is written, and what a mutant has instead."""

GUARDS = ("frozen", "slots", "strict")
"""Keywords that guard against a slip in the code, and change nothing that it does."""


MODULE = "<module>"
"""The name of a file's own code, which runs when the file is imported."""


@dataclass(frozen=True)
class Change:
    """Characters `start` to `end` of a text, and what stands there instead."""

    start: int
    end: int
    after: str
    function: str
    """The qualified name of the innermost function around it; `MODULE` outside of any.

    In a template the name alone, as a class may begin in another file.
    """

    def applied(self, text: str) -> str:
        """Return the text with the change."""
        return text[: self.start] + self.after + text[self.end :]


@dataclass(frozen=True)
class Mutant:
    """One change of one file."""

    path: str
    line: int
    change: Change

    def described(self, text: str) -> str:
        """Return place, line and change for a person: `ir/ops.py:12: if a [< → <=] b:`."""
        change = self.change
        start = text.rfind("\n", 0, change.start) + 1
        end = text.find("\n", change.end)
        before, after = text[start : change.start].lstrip(), text[change.end : end]
        return f"{self.path}:{self.line}: {before}[{text[change.start : change.end]} → {change.after}]{after}"


def mutants_of(root: Path, path: Path) -> list[Mutant]:
    """Return the mutants of a Python file, in its order."""
    text = path.read_text(encoding="utf-8")
    name = path.relative_to(root).as_posix()
    return [Mutant(name, text.count("\n", 0, change.start) + 1, change) for change in changes_of(text)]


def changes_of(text: str) -> list[Change]:
    """Return the changes of a Python text, in their order; SyntaxError where it is none."""
    return sorted(_Walk(text).below(ast.parse(text), "", MODULE), key=lambda change: change.start)


class _Walk:
    """A walk through the tree of a text that skips annotations and the inside of f-strings."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._lines = text.splitlines(keepends=True)
        self._starts = [0]
        for line in self._lines:
            self._starts.append(self._starts[-1] + len(line))

    def below(self, node: ast.AST, names: str, function: str) -> Iterator[Change]:
        """Yield the changes of a node in `function` and below it; qualified names below begin with `names`."""
        if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.keyword) and node.arg in GUARDS):
            return
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function = names + node.name
            names = f"{function}.<locals>."
        elif isinstance(node, ast.ClassDef):
            names += f"{node.name}."
        for start, end, after in self._own(node):
            yield Change(start, end, after, function)
        for name, value in ast.iter_fields(node):
            if name not in ("annotation", "returns"):
                for inner in value if isinstance(value, list) else [value]:
                    if isinstance(inner, ast.AST):
                        yield from self.below(inner, names, function)

    def _own(self, node: ast.AST) -> Iterator[tuple[int, int, str]]:
        if isinstance(node, ast.Compare):
            for left, operator, right in zip([node.left, *node.comparators], node.ops, node.comparators, strict=False):
                yield from self._between(left, operator, right)
        elif isinstance(node, ast.BoolOp):
            for left, right in zip(node.values, node.values[1:], strict=False):
                yield from self._between(left, node.op, right)
        elif isinstance(node, ast.BinOp):
            if not any(_is_text(side) for side in (node.left, node.right)):
                yield from self._between(node.left, node.op, node.right)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
            yield self._place(node)[0], self._place(node.operand)[0], ""
        elif isinstance(node, ast.If | ast.IfExp | ast.While) and not isinstance(
            node.test, ast.Compare | ast.BoolOp | ast.UnaryOp | ast.Constant
        ):
            start, end = self._place(node.test)
            yield start, end, f"(not {self.text[start:end]})"
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
            yield *self._place(node), str(not node.value)
        elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            yield *self._place(node), str(node.value + 1)

    def _between(self, left: ast.AST, operator: ast.AST, right: ast.AST) -> Iterator[tuple[int, int, str]]:
        written, instead = OPERATORS.get(type(operator), ("", ""))
        start = self._place(left)[1]
        found = re.search(rf"\b{written}\b" if written[:1].isalpha() else re.escape(written),
                          self.text[start : self._place(right)[0]])  # fmt: skip
        if written and found:
            yield start + found.start(), start + found.end(), instead

    def _place(self, node: ast.AST) -> tuple[int, int]:
        assert isinstance(node, ast.expr) and node.end_lineno is not None and node.end_col_offset is not None
        return self._offset(node.lineno, node.col_offset), self._offset(node.end_lineno, node.end_col_offset)

    def _offset(self, row: int, column: int) -> int:
        return self._starts[row - 1] + len(self._lines[row - 1].encode()[:column].decode())


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str | bytes))
