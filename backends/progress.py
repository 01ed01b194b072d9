"""Progress of long work, as plain values: backends report it, the command line shows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """One event: `step` of `total` steps of `phase` are done, `seconds` after the work began."""

    phase: str
    step: int
    total: int
    seconds: float


Callback = Callable[[Progress], None]


def silent(event: Progress) -> None:
    """Ignore an event."""
