"""The times of an engine's calls on the machine at hand, as a simulation takes them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from n3c.runtime.engines.interface import Array, Engine, Snapshot
from n3c.runtime.generation.batch import Batch
from n3c.runtime.generation.capacity import Capacity
from n3c.runtime.generation.drafter import MtpDrafter
from n3c.runtime.generation.sequence import Options, Running
from n3c.specs.schema import Spec

from .call_times import MeasuredTimes
from .engine import extent


def measure(
    engine: Engine, spec: Spec, *, repeats: int = 5, clock: Callable[[], float] = time.perf_counter
) -> MeasuredTimes:
    """Return the times of all entry points of `engine` at all its batch sizes, and of drawing and copying.

    A call is timed at an empty, a half full and a full cache, `repeats` times each after one that does not count; the
    median counts. `clock` returns seconds.
    """
    calls = {
        f"{entry}.b{rows}": tuple(_points(engine, entry, rows, spec, repeats, clock))
        for entry in engine.signatures
        for rows in engine.batch_sizes
    }
    return MeasuredTimes(calls, _draw(engine, spec, clock), _copy_rate(engine, spec, repeats, clock))


def _points(
    engine: Engine, entry: str, rows: int, spec: Spec, repeats: int, clock: Callable[[], float]
) -> list[tuple[int, float]]:
    capacity, vocabulary = spec.serving.max_seq_len, spec.model.vocab_size
    shapes = {name: (rows, *port.shape[1:]) for name, port in engine.signatures[entry].inputs.items()}
    tokens = shapes["input_ids"][1]
    assert isinstance(tokens, int)
    found: list[tuple[int, float]] = []
    for length in (1, (capacity - tokens) // 2, capacity - tokens):
        inputs = {name: _given(name, shape, length, tokens, vocabulary) for name, shape in shapes.items()}
        taken: list[float] = []
        for _ in range(repeats + 1):
            engine.reset()
            start = clock()
            engine.run(entry, inputs)
            taken.append(clock() - start)
        found.append((length + tokens, float(np.median(taken[1:]))))
    engine.reset()
    return found


def _given(name: str, shape: Sequence[Any], length: int, tokens: int, vocab_size: int) -> Array:
    """Return an input that a call of full rows has; tokens differ, as the experts that they choose then do."""
    sizes = [size for size in shape if isinstance(size, int)]
    if name in ("input_ids", "following_ids"):
        return np.arange(int(np.prod(sizes)), dtype=np.int64).reshape(sizes) * 7919 % vocab_size
    values = {"lengths": length, "counts": tokens, "accepted": 1 if length > 1 else 0}
    return np.full(sizes, values.get(name, 0), np.float32 if name == "hidden" else np.int64)


@dataclass(frozen=True, slots=True)
class Timed:
    """A call that was timed."""

    entry: str
    sequences: int
    context: int
    """Tokens that the longest of them attended to."""
    seconds: float


@dataclass
class TimedEngine:
    """An engine that notes what its calls and copies took."""

    engine: Engine
    clock: Callable[[], float]
    """Returns seconds."""
    calls: list[Timed] = field(default_factory=list[Timed], init=False)
    copies: list[tuple[int, float]] = field(default_factory=list[tuple[int, float]], init=False)
    """Bytes and seconds of each."""

    def __getattr__(self, name: str) -> Any:
        """Return what is the engine's own."""
        return getattr(self.engine, name)

    @property
    def seconds(self) -> float:
        """Of all that it did."""
        return sum(call.seconds for call in self.calls) + sum(seconds for _, seconds in self.copies)

    def run(self, entry: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run an entry point, timed."""
        start = self.clock()
        outputs = self.engine.run(entry, inputs)
        self.calls.append(Timed(entry, *extent(entry, inputs), self.clock() - start))
        return outputs

    def snapshot(self, row: int, start: int, stop: int) -> Snapshot:
        """Copy states, timed."""
        begin = self.clock()
        snapshot = self.engine.snapshot(row, start, stop)
        self.copies.append((snapshot.bytes, self.clock() - begin))
        return snapshot

    def restore(self, row: int, snapshot: Snapshot) -> None:
        """Copy states back, timed."""
        begin = self.clock()
        self.engine.restore(row, snapshot)
        self.copies.append((snapshot.bytes, self.clock() - begin))

    def times(self, draw_seconds: float) -> MeasuredTimes:
        """Return the times of the entry points that ran: of each number of sequences the best line over the context."""
        points: dict[str, list[tuple[int, float]]] = {}
        for call in self.calls:
            points.setdefault(f"{call.entry}.b{call.sequences}", []).append((call.context, call.seconds))
        copied, seconds = (sum(each[part] for each in self.copies) for part in (0, 1))
        rate = (copied or 1) / max(seconds, 1e-9)
        return MeasuredTimes({name: _line(each) for name, each in points.items()}, draw_seconds, rate)


def _line(points: Sequence[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """Return the ends of the line with the least squares of its errors; its mean is that of the points."""
    contexts, seconds = (np.array(each, float) for each in zip(*points, strict=True))
    if np.ptp(contexts) == 0:
        return ((int(contexts[0]), float(seconds.mean())),)
    slope, start = np.polyfit(contexts, seconds, 1)
    ends = (int(contexts.min()), int(contexts.max()))
    return tuple((end, max(0.0, float(start + slope * end))) for end in ends)


def _draw(engine: Engine, spec: Spec, clock: Callable[[], float]) -> float:
    """Return the seconds of a round that are not the engine's, for each token that is drawn or judged."""
    timed: Any = TimedEngine(engine, clock)
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
