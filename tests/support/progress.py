"""Progress that keeps what is reported to it."""

from __future__ import annotations


class Recorded:
    """All phases, and all steps and items as (what, done, total)."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.steps: list[tuple[str, int, int]] = []
        self.items: list[tuple[str, int, int]] = []
        self.by_phase: dict[str, list[tuple[str, int, int]]] = {}

    def phase(self, name: str) -> None:
        """Keep a phase."""
        self.phases.append(name)

    def step(self, what: str, done: int = 0, total: int = 0) -> None:
        """Keep a step."""
        self.steps.append((what, done, total))
        self.by_phase.setdefault(self.phases[-1] if self.phases else "", []).append(self.steps[-1])

    def item(self, what: str, done: int, total: int) -> None:
        """Keep an item."""
        self.items.append((what, done, total))
