"""The engine interface: it runs entry points, and is all that generation knows of a runtime.

An engine has a fixed number of sequences, holds their states between calls, and one set of weights
that all its entry points share. Which inputs an entry point takes, and what they mean, stands in
`docs/serving.md`; generation knows nothing else of a runtime.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from n3c.backends.safetensors.checkpoint import Checkpoint

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Port:
    """An input or an output of an entry point; states and weights stay inside the engine."""

    dtype: str
    """As in IR text: i64, f32."""
    shape: tuple[int | str, ...]
    """A name stands for a size that a call chooses."""


@dataclass(frozen=True, slots=True)
class Signature:
    """Inputs and outputs of an entry point, by name."""

    inputs: Mapping[str, Port]
    outputs: Mapping[str, Port]


@dataclass(frozen=True, slots=True)
class Allocation:
    """Bytes that an engine holds."""

    states: int
    """States of all its sequences, as the state plan lists them."""
    spare_states: int
    """Second copies, of states that an entry point cannot write in place."""
    weights: int


class Snapshot(Protocol):
    """The states of a sequence at one moment, where its engine keeps its own: on the same device."""

    @property
    def bytes(self) -> int:
        """Memory that it takes."""
        ...


class Engine(Protocol):
    """Runs the entry points of one model. Not thread-safe."""

    @property
    def batch(self) -> int:
        """Sequences whose states it holds: the rows 0 to batch - 1."""
        ...

    @property
    def batch_sizes(self) -> Sequence[int]:
        """Sequences that a call may have, ascending, the last of them `batch`. A call of b is of the first b rows.

        It may change what the other rows hold.
        """
        ...

    @property
    def signatures(self) -> Mapping[str, Signature]:
        """The entry points that there are: `prefill`, `decode`, and with multi-token prediction `verify`, `draft`.

        Inputs and outputs have the leading size `batch`; in a call, one of `batch_sizes`.
        """
        ...

    def run(self, entry: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run an entry point: states are read, and replaced by those after it. Outputs are the caller's to keep."""
        ...

    def reset(self, sequences: Sequence[int] | None = None) -> None:
        """Give sequences, by their rows, the states of a fresh request: zeros; None: all. The others keep theirs."""
        ...

    def snapshot(self, row: int, start: int, stop: int) -> Snapshot:
        """Return a copy of a sequence's states; of its caches, the places from `start` to `stop`."""
        ...

    def restore(self, row: int, snapshot: Snapshot) -> None:
        """Give a sequence the states of a copy; what it holds in other places of its caches stays."""
        ...

    def replace_weights(self, checkpoint: Checkpoint) -> None:
        """Take other weights of the same shapes, without building anything; N3CError (exit code 6) where they differ.

        For reinforcement learning, which changes weights between rollouts. States are reset.
        """
        ...

    def allocated(self) -> Allocation:
        """Return what the engine holds in memory."""
        ...


def call(engine: Engine, entry: str, **inputs: Array) -> dict[str, Array]:
    """Run an entry point on those of `inputs` that it takes: a model without attention has no `lengths`."""
    taken = engine.signatures[entry].inputs
    return engine.run(entry, {name: value for name, value in inputs.items() if name in taken})


KEY_POSITIONS = "key_positions"


def key_positions(signature: Signature, inputs: Mapping[str, Array], most: int, bucket: int = 1) -> dict[str, Array]:
    """Return the input that bounds what attention reads, 0, 1, … up to the last position that a call writes.

    Engines feed it themselves; nothing where the entry point has no such input. Its size is rounded up to a multiple
    of `bucket`, and is at most `most`, the capacity of the caches.
    """
    if KEY_POSITIONS not in signature.inputs:
        return {}
    end = int(inputs["lengths"].max()) + int(inputs["input_ids"].shape[1])
    return {KEY_POSITIONS: np.arange(min(-(-end // bucket) * bucket, most), dtype=np.int64)}
