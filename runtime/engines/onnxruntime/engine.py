"""The engine on a CPU: sessions over one set of weights and one set of states."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from n3c.backends.onnx.bindings import Binding
from n3c.backends.onnx.emit import OnnxEntry
from n3c.backends.progress import SILENT, Progress
from n3c.backends.safetensors.checkpoint import Checkpoint
from n3c.backends.safetensors.sources import load
from n3c.ir.program import Parameter
from n3c.runtime.engines.interface import Allocation, Array, Signature, Snapshot, key_positions

from .session import DTYPES, Session


@dataclass(frozen=True, slots=True)
class Copied:
    """States of a sequence, by name; of caches, some places."""

    states: Mapping[str, Array]
    places: slice

    @property
    def bytes(self) -> int:
        """Memory of the arrays."""
        return sum(state.nbytes for state in self.states.values())


class OnnxRuntimeEngine:
    """Runs entry points in their float32 rendering.

    Caches are written in place. Of every other state there are two buffers, which change places after each call
    that writes it: the graph may still read the old value when it writes the new one.
    """

    def __init__(
        self,
        entries: Sequence[OnnxEntry],
        checkpoint: Checkpoint,
        *,
        capacity: int,
        in_place: Collection[str] = (),
        progress: Progress = SILENT,
    ) -> None:
        """Load weights and make sessions; an entry point may come in several batch sizes, all in the same.

        `capacity` is that of the caches in tokens; `in_place` names the states that a call may overwrite: caches.
        Raises N3CError: exit code 4 where ONNX Runtime refuses a graph, 6 where the checkpoint does not fit.
        """
        self.batch_sizes = sorted({entry.batch for entry in entries})
        self.batch = self.batch_sizes[-1]
        self._parameters = _distinct(entries)
        self._weights = {p.name: np.empty(p.type.static_dims, np.float32) for p in self._parameters}
        self._broken = False
        self._capacity = capacity
        self._caches = frozenset(in_place)
        largest = [entry for entry in entries if entry.batch == self.batch]
        states = {b.name: b for entry in largest for b in entry.arguments if b.kind == "state"}
        self.states = {name: _zeros(binding) for name, binding in states.items()}
        self._spare = {name: _zeros(binding) for name, binding in states.items() if name not in in_place}
        self._load(checkpoint, progress)
        self._sessions = {(entry.name, entry.batch): Session(entry, self._weights) for entry in entries}
        self.signatures: Mapping[str, Signature] = {
            entry.name: self._sessions[entry.name, self.batch].signature for entry in largest
        }

    def run(self, entry: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run an entry point. The length up to which attention reads follows from `lengths`."""
        assert not self._broken, "replacing weights failed half-way: replace them again first"
        rows = len(inputs["input_ids"])
        session = self._sessions[entry, rows]
        before = {name: self.states[name][:rows] for name in session.states}
        after = {name: self._spare.get(name, self.states[name])[:rows] for name in session.states}
        reach = key_positions(session.signature, inputs, self._capacity)
        outputs = session.run({**inputs, **reach}, before, after)
        for name in session.states:
            if name in self._spare:
                self.states[name], self._spare[name] = self._spare[name], self.states[name]
        return outputs

    def reset(self, sequences: Sequence[int] | None = None) -> None:
        """Zero the states of `sequences`, or all."""
        for state in self.states.values():
            state[slice(None) if sequences is None else list(sequences)] = 0

    def snapshot(self, row: int, start: int, stop: int) -> Copied:
        """Copy the row of every state."""
        places = slice(start, stop)
        return Copied({name: self._part(name, row, places).copy() for name in self.states}, places)

    def restore(self, row: int, snapshot: Snapshot) -> None:
        """Copy back."""
        assert isinstance(snapshot, Copied)
        for name, state in snapshot.states.items():
            self._part(name, row, snapshot.places)[...] = state

    def replace_weights(self, checkpoint: Checkpoint) -> None:
        """Read other weights into the same buffers."""
        self._load(checkpoint, SILENT)
        self.reset()

    def allocated(self) -> Allocation:
        """Count the buffers."""
        states, spare, weights = (
            sum(array.nbytes for array in arrays.values()) for arrays in (self.states, self._spare, self._weights)
        )
        return Allocation(states, spare, weights)

    def _part(self, name: str, row: int, places: slice) -> Array:
        """Return the state of a row, uncopied; of a cache [Y, C, Z] some places."""
        state: Array = self.states[name][row]
        return state[:, places] if name in self._caches else state

    def _load(self, checkpoint: Checkpoint, progress: Progress) -> None:
        self._broken = True
        for i, parameter in enumerate(self._parameters):
            np.copyto(self._weights[parameter.name], load(parameter, checkpoint))
            progress.step(parameter.name, i + 1, len(self._parameters))
        self._broken = False


def _distinct(entries: Sequence[OnnxEntry]) -> list[Parameter]:
    """Return the parameters of all entry points, each once."""
    return list({p.name: p for entry in entries for p in entry.parameters}.values())


def _zeros(binding: Binding) -> Array:
    return np.zeros(binding.shape, DTYPES[binding.dtype])
