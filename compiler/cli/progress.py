"""Progress on stderr: one live line on a terminal, with a bar where a total is known; plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING

from n3c.ir.text import escaped

from .output import animated, chosen, colored, tell

if TYPE_CHECKING:
    from .live import LiveLine

PLAIN_INTERVAL = 5.0
"""Seconds between plain lines of one phase."""


class TerminalProgress:
    """Phases, what they are at, and the time since the start; a context manager. With --quiet it shows nothing."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._phase, self._begun = "", self._start
        self._last = 0.0
        self._live: LiveLine | None = None
        self._quiet, self._verbose = chosen("quiet"), chosen("verbose")

    def __enter__(self) -> TerminalProgress:
        if animated() and not self._quiet and not self._verbose:
            from .live import LiveLine  # loads rich

            self._live = LiveLine(color=colored())
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()  # shows the cursor again, after an error too

    def phase(self, name: str) -> None:
        """Begin a phase."""
        self._phase, self._begun = name, time.monotonic()
        if self._live is not None:
            self._live.show(name)
        else:
            self._line(name, always=True)

    def step(self, what: str, done: int = 0, total: int = 0) -> None:
        """Tell what the phase is at; the count only where a `total` is known."""
        if self._live is not None:
            self._live.show(f"{self._phase}: {what}", done, total)
        else:
            count = f" {done}/{total}" if total else ""
            self._line(f"{self._phase}: {what}{count}", always=self._verbose)

    def item(self, what: str, done: int, total: int) -> None:
        """Tell that an item is finished, on a line of its own or as the count of the live line, and what is left."""
        if self._live is not None:
            self._live.show(self._phase, done, total)
            return
        seconds = (time.monotonic() - self._begun) * (total - done) / done
        left = f", about {seconds:.0f} s left" if seconds >= 1 else ""
        self._line(f"{self._phase}: {what}, {done} of {total}{left}", always=True)

    def _line(self, text: str, *, always: bool) -> None:
        if not self._quiet and (always or time.monotonic() - self._last > PLAIN_INTERVAL):
            self._last = time.monotonic()
            tell(f"{self._last - self._start:6.1f} s  {escaped(text)}")
