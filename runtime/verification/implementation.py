"""The interface of an implementation: it runs the steps of a scenario and returns what each layer computed."""

from __future__ import annotations

from typing import Literal, Protocol

from .scenario import Step
from .tolerance import Tolerance
from .trace import Trace

Rounding = Literal["none", "as deployed"]
"""Whether all is float32 but the weights' own values, served weight-only, or states and activations are rounded to what
is deployed."""


class Implementation(Protocol):
    """One implementation of the model."""

    @property
    def name(self) -> str:
        """As the table shows it."""
        ...

    @property
    def rounding(self) -> Rounding:
        """Which of the two references it is compared with: the one that rounds the same numbers."""
        ...

    @property
    def tolerance(self) -> Tolerance:
        """The difference from the reference that is allowed."""
        ...

    def reset(self) -> None:
        """Begin new sequences."""
        ...

    def run(self, step: Step, reference: Trace) -> Trace | None:
        """Run a step after those before; None where there is no such entry point.

        `reference` is what the reference computed in this step, from which an implementation whose layers can be
        run one by one goes on after each of them.
        """
        ...
