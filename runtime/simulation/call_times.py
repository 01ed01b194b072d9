"""Seconds of an engine's calls: what the simulated engine moves its clock by."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeGuard, cast

from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError, Span
from n3c.ir.json_file import is_count, read_json

from .kernel_times import KernelTimes


class CallTimes(Protocol):
    """How long an engine takes."""

    def call(self, entry: str, sequences: int, context: int, fed: int) -> float:
        """Return the seconds of an entry point of batch size `sequences`, of which `fed` have tokens in it.

        The longest of them attends to `context` tokens.
        """
        ...

    def copy(self, size: int) -> float:
        """Return the seconds of a copy of `size` bytes of states."""
        ...

    def draw(self) -> float:
        """Return the seconds that the host takes for a token that it draws or judges."""
        ...


@dataclass(slots=True)
class PlanTimes:
    """Of plans on a card: one for each batch size, but `prefill` has one of a single sequence, which take turns.

    A plan takes what its audit says, at the context of the call by the difference that `kernels` sees; where there is
    no audit, what `kernels` says.
    """

    kernels: KernelTimes
    audited: Mapping[str, float] = field(default_factory=dict[str, float])
    """Entry point and batch size (`decode.b1`) → seconds."""
    context: int = 0
    """Tokens that the audit counts with."""

    def call(self, entry: str, sequences: int, context: int, fed: int) -> float:
        """Return the time of a plan, or of as many as take turns."""
        return fed * self._plan(entry, 1, context) if entry == "prefill" else self._plan(entry, sequences, context)

    def _plan(self, entry: str, sequences: int, context: int) -> float:
        seconds = self.kernels.call(entry, sequences, context)
        known = self.audited.get(f"{entry}.b{sequences}") if self.audited else None
        return seconds if known is None else known + seconds - self.kernels.call(entry, sequences, self.context)

    def copy(self, size: int) -> float:
        """Return the time of a copy on the card."""
        return self.kernels.copy(size)

    def draw(self) -> float:
        """Return the time of a draw on the host."""
        return self.kernels.draw()


@dataclass(frozen=True, slots=True)
class MeasuredTimes:
    """What one machine took: of each entry point and number of sequences at some contexts, between them on a line."""

    calls: Mapping[str, tuple[tuple[int, float], ...]]
    """`decode.b1` → context and seconds, the shortest context first."""
    draw_seconds: float
    copy_bytes_per_second: float

    def call(self, entry: str, sequences: int, context: int, fed: int = 1) -> float:
        """Return the time at `context`; beyond the contexts that were measured, that of the nearest.

        It was measured with all sequences fed, and counts however many are.
        """
        points = self.calls[f"{entry}.b{sequences}"]
        before, after = points[0], points[-1]
        if context <= before[0]:
            return before[1]
        for point in points[1:]:
            if context <= point[0]:
                after = point
                share = (context - before[0]) / (after[0] - before[0])
                return before[1] + share * (after[1] - before[1])
            before = point
        return after[1]

    def copy(self, size: int) -> float:
        """Return the time of a copy."""
        return size / self.copy_bytes_per_second

    def draw(self) -> float:
        """Return the time of a draw."""
        return self.draw_seconds

    def require(self, entries: Sequence[str], batch_sizes: Sequence[int], path: Path) -> None:
        """Raise N3CError (E0850, exit code 6) unless every entry point has times at every batch size."""
        missing = [f"{entry}.b{size}" for entry in entries for size in batch_sizes]
        missing = [name for name in missing if name not in self.calls]
        if missing:
            raise _no_times(path, f"no `calls.{missing[0]}`")

    def as_json(self) -> dict[str, Any]:
        """Return the form of the file that `read_times` reads."""
        calls = {name: [[context, seconds] for context, seconds in points] for name, points in self.calls.items()}
        return {
            "calls": calls,
            "draw_seconds": self.draw_seconds,
            "copy_bytes_per_second": self.copy_bytes_per_second,
        }


def read_times(path: Path) -> MeasuredTimes:
    """Return the times in a file, as `MeasuredTimes.as_json` has them; N3CError (E0850, exit code 6) for another."""
    try:
        data = read_json(path)
    except (OSError, ValueError) as error:
        raise _no_times(path, f"cannot be read: {error}") from error
    table = cast("dict[str, Any]", data) if isinstance(data, dict) else {}
    calls = table.get("calls")
    if not isinstance(calls, dict) or not calls:
        raise _no_times(path, "`calls` is no table of times")
    found: dict[str, tuple[tuple[int, float], ...]] = {}
    for name, points in cast("dict[str, Any]", calls).items():
        if not _is_list(points) or not points or not all(_is_point(point) for point in points):
            raise _no_times(path, f"`calls.{name}` is no list of [context, seconds]")
        found[name] = tuple(sorted((int(context), float(seconds)) for context, seconds in points))
    draw, copy = table.get("draw_seconds"), table.get("copy_bytes_per_second")
    if not _is_number(draw) or not _is_number(copy) or draw < 0 or copy <= 0:
        raise _no_times(path, "`draw_seconds` and `copy_bytes_per_second` are to be numbers above 0")
    return MeasuredTimes(found, float(draw), float(copy))


def _is_point(point: object) -> bool:
    return _is_list(point) and len(point) == 2 and all(_is_number(value) and value >= 0 for value in point)


def _is_list(value: object) -> TypeGuard[list[Any]]:
    return isinstance(value, list)


def _is_number(value: object) -> TypeGuard[int | float]:
    return is_count(value) or (isinstance(value, float) and math.isfinite(value))


def _no_times(path: Path, message: str) -> N3CError:
    help_ = "`n3c.runtime.simulation.measure.measure` measures an engine, and `as_json` of its result is such a file"
    return N3CError(Diagnostic("E0850", f"no measured times: {message}", Span(str(path)), help=help_), ExitCode.FILE)
