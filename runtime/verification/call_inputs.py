"""The inputs of the calls that a step makes, and the part of a result that belongs to tokens."""

from __future__ import annotations

import numpy as np

from n3c.ir.program import EntryPoint, Program
from n3c.runtime.engines.interface import Array

from .scenario import Step


class CallInputs:
    """Makes the inputs of calls; keeps the hidden state that an implementation gave for its next draft."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._hidden: Array | None = None

    def reset(self) -> None:
        """Forget the hidden state."""
        self._hidden = None

    def of(self, step: Step) -> dict[str, Array]:
        """Return the inputs of `step` by name, also those that the entry point does not read."""
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

    def keep_hidden(self, step: Step, outputs: dict[str, Array]) -> None:
        """Keep the hidden state of the last token that stays."""
        if "hidden" in outputs:
            hidden = outputs["hidden"]
            last = 0 if hidden.shape[1] == 1 else step.commits - 1
            self._hidden = hidden[:, last : last + 1]


def _capacity(program: Program) -> int:
    """Return the tokens that the caches hold."""
    sizes = [state.type.dims[2] for state in program.states.values() if state.kind == "kv"]
    return next((size for size in sizes if isinstance(size, int)), 1 << 40)


def without_padding(value: Array, step: Step, entry: EntryPoint) -> Array:
    """Return the part of a layer's result [B, tokens, …] that belongs to tokens and not to padding."""
    count = step.tokens.shape[1]
    return value[:, :count] if value.ndim > 2 and value.shape[1] == entry.tokens else value
