"""The interface of a pass, and `run_pipeline`, which runs passes in order.

A pass is a frozen dataclass: its fields are its options, `run` rewrites a valid program into a valid
program and returns whether it changed anything. It knows nothing of dumping, timing or verifying:
`run_pipeline` does these between passes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from n3c.ir.program import Program
from n3c.ir.verify import InvalidProgramError, verify


class Pass(Protocol):
    """A rewrite of programs."""

    name: ClassVar[str]

    def run(self, program: Program) -> bool:
        """Rewrite `program` in place; return whether anything changed. N3CError where the spec is at fault."""
        ...


@dataclass(frozen=True, slots=True)
class PassReport:
    """One pass that ran."""

    name: str
    seconds: float
    changed: bool


class BrokenPassError(Exception):
    """A pass left an unsound program: a fault of n3c, never of the user."""


def run_pipeline(
    program: Program, passes: Sequence[Pass], after: Callable[[str, Program], None] | None = None
) -> list[PassReport]:
    """Run `passes` in order, verifying after each, and call `after` with its name; BrokenPassError names a culprit."""
    reports: list[PassReport] = []
    for pass_ in passes:
        start = time.perf_counter()
        changed = pass_.run(program)
        reports.append(PassReport(pass_.name, time.perf_counter() - start, changed))
        try:
            verify(program)
        except InvalidProgramError as error:
            raise BrokenPassError(f"pass `{pass_.name}` left an unsound program:\n{error}") from error
        if after is not None:
            after(pass_.name, program)
    return reports
