"""Progress on stderr: a live line on a terminal, plain lines otherwise. No percent that is not known."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

import click

from .output import colored

PLAIN_INTERVAL = 5.0
"""Seconds between plain lines of one phase."""


class Progress:
    """Phases with what they are at and the time since the start; a context manager."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._start = time.monotonic()
        self._quiet = quiet
        self._phase = ""
        self._last = 0.0
        self._status: Any = None

    def __enter__(self) -> Progress:
        if not self._quiet and sys.stderr.isatty():
            from rich.console import Console

            self._status = Console(stderr=True, no_color=not colored()).status("starting")
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._status is not None:
            self._status.stop()

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    def phase(self, name: str) -> None:
        """Begin a phase."""
        self._phase = name
        self._show(name, always=True)

    def step(self, what: str, done: int | None = None, total: int | None = None) -> None:
        """Tell what the phase is at."""
        count = f" {done}/{total}" if done is not None and total else ""
        self._show(f"{self._phase}: {what}{count}", always=False)

    def _show(self, text: str, *, always: bool) -> None:
        if self._quiet:
            return
        line = f"{self.elapsed:6.1f} s  {text}"
        if self._status is not None:
            self._status.update(line.replace("[", r"\["))
        elif always or time.monotonic() - self._last > PLAIN_INTERVAL:
            self._last = time.monotonic()
            click.echo(line, err=True)
