"""The simulated engine under the batch: the calls are those of a real engine for the same arrivals in rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from n3c.passes.state_layout import StatePlan
from n3c.runtime.engines.interface import Array, Engine
from n3c.runtime.generation.batch import Batch
from n3c.runtime.generation.capacity import Capacity
from n3c.runtime.generation.distribution import certain
from n3c.runtime.generation.drafter import Drafter, MtpDrafter
from n3c.runtime.generation.prefix_cache import PrefixCache
from n3c.runtime.generation.sequence import Options, Running
from n3c.runtime.generation.speculative import Draft
from n3c.runtime.simulation.call_times import MeasuredTimes
from n3c.runtime.simulation.engine import SimulatedEngine, VirtualClock, standing
from n3c.runtime.simulation.replica import Replica
from n3c.runtime.simulation.workload import Request
from n3c.specs.load import load_spec
from n3c.specs.shipped import spec_file
from support.fake_engine import FakeEngine, table
from support.small_engine import SmallModel, small_model

VOCAB = 97
SIZES = (1, 2, 4)
FREE = MeasuredTimes({f"{e}.b{b}": ((1, 0.0),) for e in ("prefill", "decode", "verify", "draft") for b in SIZES}, 0, 1)

TOLD = ("lengths", "counts", "accepted")
Called = tuple[str, int, list[list[int]]]
"""Entry point, batch size, and what it was told by the inputs `TOLD`."""


@dataclass
class Recorder:
    """Passes calls on, and notes what they are told."""

    engine: Any
    calls: list[Called] = field(default_factory=list[Called])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def run(self, entry: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        told: list[list[int]] = [inputs[key].tolist() if key in inputs else [] for key in TOLD]
        self.calls.append((entry, len(inputs["input_ids"]), told))
        return self.engine.run(entry, inputs)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Arrival:
    round: int
    prompt: tuple[int, ...]
    tokens: int


def arrivals(seed: int, count: int = 14) -> list[Arrival]:
    """Draw requests, many of which begin as another does."""
    random, found = np.random.default_rng(seed), list[Arrival]()
    for _ in range(count):
        prompt = random.integers(0, VOCAB, int(random.integers(1, 25))).tolist()
        if found and random.random() < 0.5:
            prompt = [*found[int(random.integers(len(found)))].prompt, *prompt][:30]
        found.append(Arrival(int(random.integers(0, 30)), tuple(prompt), int(random.integers(1, 9))))
    return sorted(found, key=lambda each: each.round)


def calls_of(engine: Any, given: Sequence[Arrival], drafter: Drafter | None, memory: int | None) -> list[Called]:
    """Return the calls for requests that come before their rounds."""
    recorder: Any = Recorder(engine)
    cache = None if memory is None else PrefixCache(memory, drafter is not None)
    batch = Batch(recorder, Capacity(40, VOCAB), drafter, cache)
    waiting, now = list(given), 0
    while waiting or batch.rows:
        while waiting and waiting[0].round <= now and batch.free:
            arrival = waiting.pop(0)
            batch.add(Running.begin(arrival.prompt, now, Options(max_new_tokens=arrival.tokens), None))
        batch.round()
        now += 1
    calls: list[Called] = recorder.calls
    return calls


def plan_of(draft_tokens: int) -> StatePlan:
    return StatePlan((), 40, draft_tokens, 0, 2, 1, 8, 4, 0)


def simulated(acceptance: float, drafts: int, chunk: int) -> SimulatedEngine:
    return SimulatedEngine(plan_of(drafts), SIZES, chunk, FREE, acceptance)


class Wrong:
    """Drafts what the model never takes."""

    def propose(
        self, engine: Engine, sequences: Sequence[Running | None], lengths: Array, count: int
    ) -> list[list[Draft]]:
        proposed = MtpDrafter().propose(engine, sequences, lengths, count)
        return [[Draft(VOCAB - 1, certain(VOCAB - 1))] * len(drafts) for drafts in proposed]


@pytest.mark.parametrize("memory", [None, 10**9])
@pytest.mark.parametrize("seed", range(8))
def test_calls_are_those_of_an_engine(seed: int, memory: int | None) -> None:
    """Without drafts, with drafts that always stand, and with drafts that never do."""
    given = arrivals(seed)
    never = table(VOCAB, seed)

    def without_last(tokens: Sequence[int]) -> Any:
        logits = never(tokens).copy()
        logits[VOCAB - 1] = -1e9
        return logits

    for drafter, stands in ((None, 0.0), (MtpDrafter(), 1.0), (Wrong(), 0.0)):
        real = FakeEngine(without_last, batch_sizes=SIZES, chunk=4, draft_tokens=2)
        expected = calls_of(real, given, drafter, memory)
        virtual: Drafter | None = None if drafter is None else MtpDrafter()
        assert calls_of(simulated(stands, 2, 4), given, virtual, memory) == expected
        assert len(expected) > 40


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    return small_model(tmp_path_factory.mktemp("simulated"))


@pytest.mark.parametrize("name", ["onnxruntime", "torch"])
def test_calls_are_those_of_a_real_engine(name: Any, small: SmallModel) -> None:
    given = arrivals(3)
    expected = calls_of(small.engine(name, *SIZES), given, None, 10**9)
    assert calls_of(simulated(0.0, 2, small.spec.serving.prefill_chunk), given, None, 10**9) == expected


COSTS = MeasuredTimes(
    {
        f"{entry}.b{rows}": ((1, seconds * rows**0.5), (40, 3 * seconds * rows**0.5))
        for entry, seconds in {"prefill": 1.0, "decode": 0.3, "verify": 0.5, "draft": 0.1}.items()
        for rows in SIZES
    },
    draw_seconds=0.02,
    copy_bytes_per_second=1e30,
)


@dataclass
class Clocked:
    """An engine that computes, and on which calls take what `COSTS` says."""

    engine: Any
    clock: VirtualClock
    stands: bool
    """Whether drafts do: the host judges those that stand."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def run(self, entry: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        rows, tokens = inputs["input_ids"].shape
        fed = (inputs["counts"] if entry == "prefill" else inputs["lengths"]) > 0
        self.clock.now += COSTS.call(entry, rows, max(inputs["lengths"][fed]) + tokens)
        drawn = tokens if entry == "verify" and self.stands else 1
        self.clock.now += int(fed.sum()) * drawn * COSTS.draw()
        return self.engine.run(entry, inputs)  # type: ignore[no-any-return]


@pytest.mark.parametrize("memory", [None, 10**9])
@pytest.mark.parametrize("drafts", [False, True])
def test_given_the_times_of_calls_every_token_comes_when_it_does_from_an_engine(
    drafts: bool, memory: int | None
) -> None:
    """Also where requests come faster than they are answered: what is off in a comparison are times, not schedules."""
    serving = replace(load_spec(spec_file("tiny"))[0].serving, batch_sizes=SIZES, prefill_chunk=4, max_seq_len=41)
    for seed, rate in ((0, 0.2), (1, 1.0), (2, 5.0)):
        random = np.random.default_rng(seed)
        comes = np.cumsum(random.exponential(1 / rate, 40))
        given = [Request(at, each.prompt, each.tokens) for at, each in zip(comes, arrivals(seed, 40), strict=True)]
        drafter, clock = MtpDrafter() if drafts else None, VirtualClock()
        fake = FakeEngine(table(VOCAB, seed), batch_sizes=SIZES, chunk=4, draft_tokens=2)
        engine: Any = Clocked(fake, clock, stands=True)
        cache = None if memory is None else PrefixCache(memory, drafts)
        real = Replica(Batch(engine, Capacity(40, VOCAB), drafter, cache), clock, lambda: 0.0)
        paper = Replica.of(serving, plan_of(2), COSTS, acceptance=3.0 if drafts else None, cache_memory=memory)
        times: list[list[tuple[float, float, int]]] = []
        for replica in (real, paper):
            replica.run(given)
            times.append([(each.first, each.last, each.tokens) for each in replica.answered])
        assert np.array(times[1]) == pytest.approx(np.array(times[0]), rel=1e-9)


@pytest.mark.parametrize("length", [1.0, 1.5, 2.7, 3.45, 4.0])
def test_as_many_drafts_stand_as_are_asked_for(length: float) -> None:
    probability = standing(length, 3)
    assert sum(probability**i for i in range(4)) == pytest.approx(length, abs=1e-9)
    engine = SimulatedEngine(plan_of(3), (1,), 8, FREE, probability, seed=1)
    batch = Batch(engine, Capacity(10**6, VOCAB), MtpDrafter())
    batch.add(Running.begin((1, 2, 3), 0, Options(max_new_tokens=3000), None))
    while batch.rows:
        batch.round()
    assert batch.decoded / batch.rounds == pytest.approx(length, rel=0.04)
