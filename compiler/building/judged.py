"""What the audit says of a build, for those who do not build."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from n3c.ir.diagnostics import Diagnostic


@dataclass(frozen=True, slots=True)
class Judged:
    """What the audit says of the plans of a build; nothing where graphs alone were built."""

    mismatches: list[Diagnostic] = field(default_factory=list[Diagnostic])
    """Precisions that are not realised."""
    traffic: dict[str, Any] = field(default_factory=dict[str, Any])
    """Of each entry point and batch size, as in audit.json."""
    time: dict[str, Any] = field(default_factory=dict[str, Any])
    """Of each entry point and batch size on each GPU, as in audit.json."""
    plans: dict[str, int] = field(default_factory=dict[str, int])
    """How many plans came from where."""
    builders_peak: int | None = None
    """The most memory that a process which built a plan has held, in bytes."""
    notes: list[Diagnostic] = field(default_factory=list[Diagnostic])
