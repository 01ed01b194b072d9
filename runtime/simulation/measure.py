"""The times of an engine's calls on the machine at hand, as a simulation takes them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from n3c.runtime.engines.interface import Array, Engine
from n3c.runtime.generation.batch import Batch
from n3c.runtime.generation.capacity import Capacity
from n3c.runtime.generation.drafter import MtpDrafter
from n3c.runtime.generation.sequence import Options, Running
from n3c.specs.schema import Spec

from .call_times import MeasuredTimes


def measure(
    engine: Engine, spec: Spec, *, repeats: int = 5, clock: Callable[[], float] = time.perf_counter
) -> MeasuredTimes:
    """Return the times of all entry points of `engine` at all its batch sizes, and of drawing and copying.

    A call is timed at an empty, a half full and a full cache, `repeats` times each after one that does not count; the
    median counts. `clock` returns seconds.
    """
    calls = {
        f"{entry}.b{rows}": tuple(_points(engine, entry, rows, spec.serving.max_seq_len, repeats, clock))
        for entry in engine.signatures
        for rows in engine.batch_sizes
    }
    return MeasuredTimes(calls, _draw(engine, spec, clock), _copy_rate(engine, spec, repeats, clock))


def _points(
    engine: Engine, entry: str, rows: int, capacity: int, repeats: int, clock: Callable[[], float]
) -> list[tuple[int, float]]:
    shapes = {name: (rows, *port.shape[1:]) for name, port in engine.signatures[entry].inputs.items()}
    tokens = shapes["input_ids"][1]
    assert isinstance(tokens, int)
    found: list[tuple[int, float]] = []
    for length in (1, (capacity - tokens) // 2, capacity - tokens):
        inputs = {name: _given(name, shape, length, tokens) for name, shape in shapes.items()}
        taken: list[float] = []
        for _ in range(repeats + 1):
            engine.reset()
            start = clock()
            engine.run(entry, inputs)
            taken.append(clock() - start)
        found.append((length + tokens, float(np.median(taken[1:]))))
    engine.reset()
    return found


def _given(name: str, shape: Sequence[Any], length: int, tokens: int) -> Array:
    """Return an input that a call of full rows has."""
    dtype = np.float32 if name == "hidden" else np.int64
    values = {"lengths": length, "counts": tokens, "accepted": 1 if length > 1 else 0}
    return np.full([size for size in shape if isinstance(size, int)], values.get(name, 0), dtype)


@dataclass
class _Timed:
    """An engine, and the seconds of its calls."""

    engine: Engine
    clock: Callable[[], float]
    seconds: float = field(default=0.0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def run(self, entry: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        start = self.clock()
        outputs = self.engine.run(entry, inputs)
        self.seconds += self.clock() - start
        return outputs


def _draw(engine: Engine, spec: Spec, clock: Callable[[], float]) -> float:
    """Return the seconds of a round that are not the engine's, for each token that is drawn or judged."""
    timed: Any = _Timed(engine, clock)
    drafter = MtpDrafter() if "verify" in engine.signatures else None
    batch = Batch(timed, Capacity.of(spec), drafter)
    steps = min(24, spec.serving.max_seq_len // 4)
    start = clock()
    for index in range(engine.batch):
        batch.add(Running.begin((index, 1, 2), index, Options(max_new_tokens=steps), None))
    tokens = 0
    while batch.rows:
        tokens += len(batch.round())
    drawn = tokens if drafter is None else tokens + batch.rounds * spec.serving.draft_tokens
    others: float = clock() - start - timed.seconds
    return max(0.0, others) / drawn


def _copy_rate(engine: Engine, spec: Spec, repeats: int, clock: Callable[[], float]) -> float:
    """Return the bytes a second of copies of states."""
    taken: list[float] = []
    size = 0
    for _ in range(repeats + 1):
        start = clock()
        snapshot = engine.snapshot(0, 0, spec.serving.max_seq_len // 2)
        engine.restore(0, snapshot)
        taken.append((clock() - start) / 2)
        size = snapshot.bytes
    return size / max(float(np.median(taken[1:])), 1e-9)
