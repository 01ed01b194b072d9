"""Two programs compared, function by function: one function a distinct block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import unified_diff
from typing import Any

from n3c.ir.printer import print_function
from n3c.ir.program import Program

CONTEXT_LINES = 2


@dataclass(frozen=True, slots=True)
class FunctionDifference:
    """A function that is new, gone or changed."""

    name: str
    state: str
    """`added`, `removed` or `changed`."""
    lines: tuple[str, ...]
    """Of a unified difference without its file names: `@@ …`, and lines that begin with ` `, `+` or `-`."""

    @property
    def added(self) -> int:
        """Return how many lines were added."""
        return sum(line.startswith("+") for line in self.lines)

    @property
    def removed(self) -> int:
        """Return how many lines were removed."""
        return sum(line.startswith("-") for line in self.lines)

    def as_json(self) -> dict[str, Any]:
        """Return one entry of `diff --json`, key `ir`."""
        return {"function": self.name, "state": self.state, "lines": list(self.lines)}


def function_texts(program: Program) -> dict[str, list[str]]:
    """Return the text form of each function, as lines; a program may be rewritten afterwards."""
    return {name: print_function(function).splitlines() for name, function in program.functions.items()}


def compare_functions(a: Mapping[str, Sequence[str]], b: Mapping[str, Sequence[str]]) -> tuple[FunctionDifference, ...]:
    """Compare functions by name. A variant that is new is shown against the function that it was made of."""
    found: list[FunctionDifference] = []
    for name in dict.fromkeys((*a, *b)):
        if name not in a:
            found.append(FunctionDifference(name, "added", _lines(a.get(_made_of(name, a), ()), b[name])))
        elif name not in b:
            found.append(FunctionDifference(name, "removed", ()))
        elif a[name] != b[name]:
            found.append(FunctionDifference(name, "changed", _lines(a[name], b[name])))
    return tuple(found)


def _lines(a: Sequence[str], b: Sequence[str]) -> tuple[str, ...]:
    return tuple(unified_diff(a, b, lineterm="", n=CONTEXT_LINES))[2:]


def _made_of(name: str, known: Mapping[str, Sequence[str]]) -> str:
    """Return the function that a variant was made of: `moe@nvfp4.prefill` of `moe@nvfp4` of `moe`."""
    while name and name not in known:
        head, dot, _ = name.rpartition(".")
        name = head if dot else name.rpartition("@")[0]
    return name
