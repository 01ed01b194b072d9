"""The work of `n3c verify`: run every form of a model through the same steps and find the first layer that differs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from n3c.backends.progress import SILENT, Progress
from n3c.ir.diagnostics import Diagnostic, Span
from n3c.ir.program import Program

from .implementation import Leg
from .scenario import Step
from .trace import Difference, differences, points


@dataclass(frozen=True, slots=True)
class Finding:
    """A difference, where it was found and what was allowed there."""

    difference: Difference
    step: str
    tolerance: float

    @property
    def excess(self) -> float:
        """The difference as a multiple of what is allowed."""
        return self.difference.relative / self.tolerance

    def as_json(self) -> dict[str, Any]:
        """Return the form of `n3c verify --json`; numbers that are not finite are null."""
        finite = np.isfinite(self.difference.relative)
        return {
            "step": self.step,
            "tensor": self.difference.point,
            "relative": self.difference.relative if finite else None,
            "largest": self.difference.largest if finite else None,
            "index": list(self.difference.index),
            "tolerance": self.tolerance,
        }


@dataclass(slots=True)
class Verdict:
    """How one form compares. `first` is what differs first in the order of the computation."""

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
        """Return the form of `n3c verify --json`, key `forms`."""
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
    reference: Leg,
    legs: list[Leg],
    program: Program,
    runs: list[list[Step]],
    progress: Progress = SILENT,
) -> list[Verdict]:
    """Run `runs`, each from fresh states. A form that differs or fails is not run on: the rest follows from that."""
    verdicts = [Verdict(leg.name) for leg in legs]
    for steps in runs:
        for leg in (reference, *legs):
            leg.reset()
        lost: set[str] = set()  # forms without an entry point: what follows it in this run, they cannot know
        for step in steps:
            progress.step(step.title)
            trace = reference.run(step)
            assert trace is not None
            order = points(program.entry_points[step.entry])
            for leg, verdict in zip(legs, verdicts, strict=True):
                if not verdict.ok or leg.name in lost:
                    continue
                try:
                    other = leg.run(step)
                except Exception as error:  # whatever generated code or a runtime raises is a finding
                    verdict.failure = f"{step.title}: {type(error).__name__}: {error}"
                    continue
                if other is None:
                    lost.add(leg.name)
                    continue
                verdict.steps += 1
                _note(verdict, step, leg.tolerance, differences(order, trace, other))
    return verdicts


def _note(verdict: Verdict, step: Step, tolerance: float, found: Iterator[Difference]) -> None:
    for difference in found:
        verdict.compared += 1
        here = Finding(difference, step.title, tolerance)
        if verdict.worst is None or here.excess > verdict.worst.excess:
            verdict.worst = here
        if here.excess > 1:
            verdict.first = here
            return


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
    if not np.isfinite(first.relative):
        return f"{name}: `{first.point}` is not finite, or of another shape, in {found.step}"
    return (
        f"{name}: the first difference is at `{first.point}` in {found.step}: {first.relative:.1e} of its size, where"
        f" {found.tolerance:.0e} is allowed; the largest is {first.largest:.2e} at {list(first.index)}"
    )


def _span(program: Program, point: str) -> Span | None:
    """Return the spec line of the layer that a point belongs to: its label, or one of its states."""
    for call in program.calls():
        if call.label == point or point in call.states:
            return call.origin.span
    return None
