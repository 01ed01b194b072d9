"""Progress of long work: whoever does it reports to a `Progress`; the command line shows one on stderr."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """The interface that long work reports to."""

    def phase(self, name: str) -> None:
        """Report that the phase `name` begins."""
        ...

    def step(self, what: str, done: int = 0, total: int = 0) -> None:
        """Report what the phase is at: `done` of `total`, where a total is known."""
        ...

    def item(self, what: str, done: int, total: int) -> None:
        """Report that `what`, the last of `done` items of the phase's `total`, is finished."""
        ...


class _Silent:
    """Progress that is dropped."""

    def phase(self, name: str) -> None:
        """Ignore a phase."""

    def step(self, what: str, done: int = 0, total: int = 0) -> None:
        """Ignore a step."""

    def item(self, what: str, done: int, total: int) -> None:
        """Ignore an item."""


SILENT: Progress = _Silent()
