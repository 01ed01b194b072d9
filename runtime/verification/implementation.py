"""The forms of a model that are compared: each runs a step and tells what it computed, layer by layer."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from n3c.ir.program import EntryPoint, Program
from n3c.runtime.engines.interface import Array
from n3c.runtime.engines.reference.engine import ReferenceEngine

from .scenario import Step
from .trace import Trace


class Leg(Protocol):
    """One form of the model."""

    @property
    def name(self) -> str:
        """As the table shows it."""
        ...

    @property
    def tolerance(self) -> float:
        """How far from the reference it may be now, as `Difference.relative` counts."""
        ...

    def reset(self) -> None:
        """Forget everything."""
        ...

    def run(self, step: Step) -> Trace | None:
        """Run a step behind those before; None where this form has no such entry point."""
        ...


class Feeder:
    """Makes the inputs of calls, and keeps the hidden states that a form gave for its next draft."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._hidden: Array | None = None

    def reset(self) -> None:
        """Forget the hidden states."""
        self._hidden = None

    def inputs(self, step: Step) -> dict[str, Array]:
        """Return the inputs of `step` by name; those that the entry point does not read are there too."""
        batch, count = step.tokens.shape
        tokens = self._program.entry_points[step.entry].tokens
        padding = ((0, 0), (0, tokens - count))
        end = min(step.position + tokens, _capacity(self._program))
        given = {
            "input_ids": np.pad(step.tokens, padding),
            "following_ids": np.pad(step.following, padding),
            "counts": np.full(batch, count),
            "lengths": np.full(batch, step.position),
            "accepted": np.full(batch, step.accepted),
            "key_positions": np.arange(end),
        }
        return given if self._hidden is None else given | {"hidden": self._hidden}

    def keep(self, step: Step, outputs: dict[str, Array]) -> None:
        """Remember the hidden state of the last token that stays."""
        if "hidden" in outputs:
            hidden = outputs["hidden"]
            last = 0 if hidden.shape[1] == 1 else step.commits - 1
            self._hidden = hidden[:, last : last + 1]


def _capacity(program: Program) -> int:
    """Return the tokens that the caches hold."""
    sizes = [state.type.dims[2] for state in program.states.values() if state.kind == "kv"]
    return next((size for size in sizes if isinstance(size, int)), 1 << 40)


def valid(value: Array, step: Step, entry: EntryPoint) -> Array:
    """Return the part of a layer's result [B, tokens, …] that belongs to tokens and not to padding."""
    count = step.tokens.shape[1]
    return value[:, :count] if value.ndim > 2 and value.shape[1] == entry.tokens else value


class ReferenceLeg:
    """The program of the spec, op by op: what the others are measured by."""

    name = "IR reference"
    tolerance = 0.0

    def __init__(self, program: Program, engine: ReferenceEngine) -> None:
        self._program, self._engine, self._feeder = program, engine, Feeder(program)

    def reset(self) -> None:
        """Zero states."""
        self._engine.reset()
        self._feeder.reset()

    def run(self, step: Step) -> Trace | None:
        """Evaluate the entry point."""
        entry = self._program.entry_points[step.entry]
        given = self._feeder.inputs(step)
        outputs = self._engine.run(step.entry, {name: given[name] for name in entry.inputs})
        self._feeder.keep(step, outputs)
        assert self._engine.last is not None
        values, trace = self._engine.last.values, dict[str, Array]()
        for call in entry.calls:
            for name in call.outputs[:1]:
                trace[call.label] = valid(values[name].float().numpy(), step, entry)
            trace |= {name: self._engine.states[name].float().numpy() for name in call.states}
        return trace
