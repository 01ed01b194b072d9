"""Running implementations through the same steps, and finding the first layer of each that differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from n3c.backends.progress import SILENT, Progress
from n3c.ir.diagnostics import Diagnostic, Span
from n3c.ir.program import Program

from .implementation import Implementation, Rounding
from .reference import Reference
from .scenario import Step
from .tolerance import Bounds
from .trace import Difference, differences, points


@dataclass(frozen=True, slots=True)
class Finding:
    """A difference, where it was found and what was allowed there."""

    difference: Difference
    step: str
    error: float
    """Of all tokens or of the median one, whichever is farther beyond what is allowed or nearer to it."""
    tolerance: float

    @staticmethod
    def of(difference: Difference, step: Step, bounds: Bounds) -> Finding:
        """Return the worse of the two errors of `difference`, as a multiple of what is allowed."""
        pairs = ((difference.relative, bounds.relative), (difference.typical, bounds.typical))
        return Finding(difference, step.title, *max(pairs, key=lambda pair: pair[0] / pair[1]))

    @property
    def excess(self) -> float:
        """The error as a multiple of what is allowed."""
        return self.error / self.tolerance

    def as_json(self) -> dict[str, Any]:
        """Return the form of `n3c verify --json`; numbers that are not finite are null."""
        finite = np.isfinite(self.error)
        return {
            "step": self.step,
            "tensor": self.difference.point,
            "relative": self.error if finite else None,
            "largest": self.difference.largest if finite else None,
            "index": list(self.difference.index),
            "tolerance": self.tolerance,
        }


@dataclass(slots=True)
class Verdict:
    """How one implementation compares. `first` is what differs first in the order of the computation."""

    name: str
    steps: int = 0
    compared: int = 0
    """Tensors."""
    worst: Finding | None = None
    """The nearest to its tolerance, or the farthest beyond."""
    first: Finding | None = None
    failure: str = ""
    """Why it could not be run to the end."""

    @property
    def ok(self) -> bool:
        """Whether it agrees everywhere."""
        return self.first is None and not self.failure

    def as_json(self) -> dict[str, Any]:
        """Return the form of `n3c verify --json`, key `implementations`."""
        return {
            "name": self.name,
            "ok": self.ok,
            "steps": self.steps,
            "tensors": self.compared,
            "worst": self.worst.as_json() if self.worst is not None else None,
            "first": self.first.as_json() if self.first is not None else None,
            "failure": self.failure or None,
        }


def compare(
    references: Mapping[Rounding, Reference],
    implementations: Sequence[Implementation],
    program: Program,
    runs: Sequence[Sequence[Step]],
    progress: Progress = SILENT,
) -> list[Verdict]:
    """Run `runs`, each from fresh states, and compare each implementation with the reference of its rounding.

    One that differs or fails is not run on: the rest follows from that.
    """
    verdicts = [Verdict(implementation.name) for implementation in implementations]
    for steps in runs:
        for reference in references.values():
            reference.reset()
        for implementation in implementations:
            implementation.reset()
        lost: set[str] = set()  # those without an entry point: what follows it in this run, they cannot know
        for step in steps:
            progress.step(step.title)
            expected = {rounding: reference.run(step) for rounding, reference in references.items()}
            order = points(program.entry_points[step.entry], program)
            for implementation, verdict in zip(implementations, verdicts, strict=True):
                if not verdict.ok or implementation.name in lost:
                    continue
                right = expected[implementation.rounding]
                try:
                    trace = implementation.run(step, right)
                except Exception as error:  # whatever generated code or a runtime raises is a finding
                    verdict.failure = f"{step.title}: {type(error).__name__}: {error}"
                    continue
                if trace is None:
                    lost.add(implementation.name)
                    continue
                verdict.steps += 1
                doubts = references[implementation.rounding].doubts
                for difference in differences(order, right, trace, doubts):
                    if not _note(verdict, step, difference, implementation.tolerance(step, difference, doubts)):
                        break
    return verdicts


def _note(verdict: Verdict, step: Step, difference: Difference, bounds: Bounds) -> bool:
    """Count what was compared, and remember the worst difference; return whether it is within the bounds."""
    verdict.compared += 1
    finding = Finding.of(difference, step, bounds)
    if verdict.worst is None or finding.excess > verdict.worst.excess:
        verdict.worst = finding
    if finding.excess > 1:
        verdict.first = finding
    return verdict.first is None


def diagnostics(verdicts: list[Verdict], program: Program, build: str) -> list[Diagnostic]:
    """Return what differs, at the spec line of its layer."""
    found: list[Diagnostic] = []
    for verdict in verdicts:
        if verdict.failure:
            found.append(Diagnostic("E0821", f"{verdict.name} fails: {verdict.failure}", Span(build)))
        elif verdict.first is not None:
            span = _span(program, verdict.first.difference.point)
            found.append(Diagnostic("E0820", _sentence(verdict.name, verdict.first), span))
    return found


def _sentence(name: str, found: Finding) -> str:
    first = found.difference
    if not np.isfinite(found.error):
        return f"{name}: `{first.point}` is not finite, or of another shape, in {found.step}"
    return (
        f"{name}: the first difference is at `{first.point}` in {found.step}: {found.error:.1e} of its size, where"
        f" {found.tolerance:.0e} is allowed; the largest is {first.largest:.2e} at {list(first.index)}"
    )


def _span(program: Program, point: str) -> Span | None:
    """Return the spec line of the layer that a point belongs to: its label, or one of its states."""
    for call in program.calls():
        if call.label == point or point in call.states:
            return call.origin.span
    return None
