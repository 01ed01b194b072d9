"""Progress on stderr: a live line on a terminal, plain lines otherwise. No percent that is not known."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import TracebackType
from typing import Any

from .output import colored, tell

PLAIN_INTERVAL = 5.0
"""Seconds between plain lines of one phase."""


class TerminalProgress:
    """Phases, what they are at, and the time since the start; a context manager.

    Inside, SIGTERM interrupts as Ctrl-C does, so that a killed build cleans up and shows the cursor again.
    """

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._phase = ""
        self._last = 0.0
        self._live: Any = None
        self._on_terminate: Any = None

    def __enter__(self) -> TerminalProgress:
        if threading.current_thread() is threading.main_thread():
            self._on_terminate = signal.signal(signal.SIGTERM, signal.default_int_handler)
        if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            from rich.console import Console

            self._live = Console(stderr=True, no_color=not colored()).status("starting")
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()  # shows the cursor again, after an error too
        if self._on_terminate is not None:
            signal.signal(signal.SIGTERM, self._on_terminate)

    def phase(self, name: str) -> None:
        """Begin a phase."""
        self._phase = name
        self._show(name, always=True)

    def step(self, what: str, done: int = 0, total: int = 0) -> None:
        """Tell what the phase is at; the count only where a `total` is known."""
        count = f" {done}/{total}" if total else ""
        self._show(f"{self._phase}: {what}{count}", always=False)

    def _show(self, text: str, *, always: bool) -> None:
        line = f"{time.monotonic() - self._start:6.1f} s  {text}"
        if self._live is not None:
            from rich.text import Text

            self._live.update(Text(line))  # not markup: names may hold brackets
        elif always or time.monotonic() - self._last > PLAIN_INTERVAL:
            self._last = time.monotonic()
            tell(line)
