"""What differs of two specs, checkpoints or builds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from n3c.ir.diagnostics import Diagnostic

from .block_difference import BlockDifference
from .blocks import Block
from .ir_difference import FunctionDifference
from .notebook import framed
from .spec_difference import Change
from .subject import Subject


@dataclass(frozen=True, slots=True)
class FigureChange:
    """A figure of `inspect` that two models have differently."""

    figure: str
    a: int
    b: int

    @property
    def ratio(self) -> float | None:
        """Return b / a; None where a is 0."""
        return self.b / self.a if self.a else None

    def as_json(self) -> dict[str, Any]:
        """Return one entry of `diff --json`, key `figures`."""
        return {"figure": self.figure, "a": self.a, "b": self.b, "ratio": self.ratio}


@dataclass(frozen=True, slots=True)
class Difference:
    """The result of `diff`."""

    a: Subject
    b: Subject
    blocks_a: tuple[Block, ...]
    blocks_b: tuple[Block, ...]
    spec: tuple[Change, ...]
    figures: tuple[FigureChange, ...]
    blocks: tuple[BlockDifference, ...]
    ir: tuple[FunctionDifference, ...]
    build: tuple[Change, ...]
    """Of two builds: tools, options, files, audits."""
    tensors: Any
    """A `TensorDifference`, of two checkpoints with weights; otherwise None."""
    warnings: tuple[Diagnostic, ...]
    page: Callable[[], str] = field(repr=False, compare=False)
    """Returns all differences as one page of HTML, offline and without libraries."""

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return not any((self.spec, self.figures, self.blocks, self.ir, self.build, self.tensors))

    def _repr_html_(self) -> str:
        """Return the page in a frame, for notebooks."""
        return framed(self.page())

    def as_json(self) -> dict[str, Any]:
        """Return the form of `n3c diff --json`."""
        return {
            "equal": self.equal,
            "a": {"path": self.a.given, "kind": self.a.kind, "name": self.a.spec.name},
            "b": {"path": self.b.given, "kind": self.b.kind, "name": self.b.spec.name},
            "spec": [change.as_json() for change in self.spec],
            "figures": [change.as_json() for change in self.figures],
            "blocks": [change.as_json() for change in self.blocks],
            "ir": [change.as_json() for change in self.ir],
            "build": [change.as_json() for change in self.build],
            "tensors": None if self.tensors is None else self.tensors.as_json(),
            "diagnostics": [warning.as_json() for warning in self.warnings],
        }
