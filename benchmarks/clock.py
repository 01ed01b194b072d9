"""A clock for requests that come by chance: time in which nothing is to be done passes at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class SkippingClock:
    """The seconds of another clock since this one was made, and the time that was skipped."""

    tick: Callable[[], float]
    """Returns the other clock's seconds."""
    _start: float = field(init=False)
    _skipped: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._start = self.tick()

    @property
    def now(self) -> float:
        """Seconds."""
        return self.tick() - self._start + self._skipped

    @now.setter
    def now(self, value: float) -> None:
        self._skipped += value - self.now
