"""The engine interface over the reference evaluation: slow, exact in what every op means, for proofs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from n3c.backends.safetensors.checkpoint import Checkpoint
from n3c.backends.safetensors.sources import load
from n3c.ir.program import Program
from n3c.ir.types import DType
from n3c.runtime.engines.interface import Allocation, Array, Signature, Snapshot, key_positions
from n3c.runtime.engines.signature import signature_of

from .evaluate import TORCH_DTYPES, Choice, Evaluation, by_definition, evaluate, zero_states


def as_tensor(array: Array, dtype: DType) -> Tensor:
    """Return a numpy array, of ml_dtypes too, as a tensor of the same bytes."""
    raw = torch.as_tensor(np.ascontiguousarray(array).reshape(-1).view(np.uint8).copy())
    return raw.view(TORCH_DTYPES[dtype]).reshape(array.shape)


@dataclass(frozen=True, slots=True)
class Copied:
    """States of a sequence, by name; of caches, some places."""

    states: Mapping[str, Tensor]
    places: slice

    @property
    def bytes(self) -> int:
        """Memory of the tensors."""
        return sum(state.nbytes for state in self.states.values())


class ReferenceEngine:
    """Runs every entry point of a served program; `last` keeps the values between calls of the latest run."""

    def __init__(
        self,
        program: Program,
        checkpoint: Checkpoint,
        *,
        batch_sizes: Sequence[int],
        capacity: int,
        choice: Choice = by_definition,
    ) -> None:
        """Read the weights; N3CError (exit code 6) where the checkpoint does not fit.

        `capacity` is in tokens; `choice` may take another evaluator of an op than its definition.
        """
        self.batch_sizes, self.batch = sorted(batch_sizes), max(batch_sizes)
        self._program, self._capacity, self._choice = program, capacity, choice
        self.last: Evaluation | None = None
        self.states: dict[str, Tensor] = {}
        self.signatures: Mapping[str, Signature] = {
            name: signature_of(program, entry, self.batch) for name, entry in program.entry_points.items()
        }
        self.replace_weights(checkpoint)

    def run(self, entry: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Evaluate an entry point."""
        names = self._program.entry_points[entry]
        given = {**inputs, **key_positions(self.signatures[entry], inputs, self._capacity)}
        tensors = {name: torch.as_tensor(np.array(value)) for name, value in given.items()}
        rows = len(tensors["input_ids"])
        before = {name: state[:rows] for name, state in self.states.items()}
        self.last = evaluate(self._program, entry, tensors, self._parameters, before, self._choice)
        others = {name: state[rows:] for name, state in self.states.items()}
        self.states = {name: torch.cat([state, others[name]]) for name, state in self.last.states.items()}
        return {name: value.numpy() for name, value in zip(names.outputs, self.last.outputs, strict=True)}

    def reset(self, sequences: Sequence[int] | None = None) -> None:
        """Make states of zeros; of other sequences than `sequences`, where given, with what they hold."""
        fresh = zero_states(self._program, self.batch)
        if sequences is not None:
            others = [row for row in range(self.batch) if row not in sequences]
            for name, state in fresh.items():
                state[others] = self.states[name][others]
        self.states = fresh

    def snapshot(self, row: int, start: int, stop: int) -> Copied:
        """Copy the row of every state."""
        places = slice(start, stop)
        return Copied({name: self._part(name, row, places).clone() for name in self.states}, places)

    def restore(self, row: int, snapshot: Snapshot) -> None:
        """Copy back."""
        assert isinstance(snapshot, Copied)
        for name, state in snapshot.states.items():
            self._part(name, row, snapshot.places)[...] = state

    def replace_weights(self, checkpoint: Checkpoint) -> None:
        """Read other weights."""
        parameters = self._program.parameters
        self._parameters = {name: as_tensor(load(p, checkpoint), p.type.dtype) for name, p in parameters.items()}
        self.reset()

    def _part(self, name: str, row: int, places: slice) -> Tensor:
        """Return the state of a row, uncopied; of a cache [Y, C, Z] some places."""
        state = self.states[name][row]
        return state[:, places] if self._program.states[name].kind == "kv" else state

    def allocated(self) -> Allocation:
        """Count states and weights; every run makes new states."""
        states, weights = (sum(t.nbytes for t in tensors.values()) for tensors in (self.states, self._parameters))
        return Allocation(states, 0, weights)
