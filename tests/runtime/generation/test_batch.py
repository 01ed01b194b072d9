"""Sequences that join and leave an engine at any round, and go on from what was read before, as if each were alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pytest

from n3c.runtime.engines.interface import Array, Engine
from n3c.runtime.generation.batch import Batch
from n3c.runtime.generation.capacity import Capacity
from n3c.runtime.generation.distribution import certain
from n3c.runtime.generation.drafter import Drafter, MtpDrafter
from n3c.runtime.generation.prefix_cache import PrefixCache
from n3c.runtime.generation.sampling import Sampling
from n3c.runtime.generation.sequence import Options, Running
from n3c.runtime.generation.speculative import Draft
from support.fake_engine import FakeEngine, table
from support.small_engine import SmallModel, small_model

VOCAB = 11
CAPACITY = Capacity(context_length=60, vocab_size=VOCAB)
SIZES = (1, 2, 4)
CHUNK = 4


@dataclass(frozen=True)
class Request:
    """A prompt that comes before round `arrives`, and is dropped after `patience` rounds in the batch."""

    prompt: tuple[int, ...]
    options: Options
    seed: int
    arrives: int
    patience: int | None

    def begin(self) -> Running:
        return Running.begin(self.prompt, self.seed, self.options, None)


@dataclass
class Schedule:
    """What happened to the requests: their sequences, and the rounds that they ran."""

    sequences: list[Running]
    stayed: list[int] = field(default_factory=list[int])


def scheduled(requests: Sequence[Request], batch: Batch) -> Schedule:
    """Run requests as they arrive and as there is room, and drop those whose patience ends."""
    waiting = sorted(range(len(requests)), key=lambda i: requests[i].arrives)
    sequences = [request.begin() for request in requests]
    schedule = Schedule(sequences, [0] * len(requests))
    now = 0
    while waiting or batch.rows:
        while waiting and batch.free and requests[waiting[0]].arrives <= now:
            batch.add(sequences[waiting.pop(0)])
        for index, sequence in enumerate(sequences):
            if sequence in batch.rows:
                if requests[index].patience == schedule.stayed[index]:
                    batch.drop(sequence)
                else:
                    schedule.stayed[index] += 1
        batch.round()
        now += 1
    return schedule


def drawn(random: np.random.Generator, count: int, vocabulary: int, sampling: Sequence[Sampling]) -> list[Request]:
    """Draw requests; many begin as others do, and some go on from a whole prompt."""
    requests: list[Request] = []
    for index in range(count):
        prompt = random.integers(0, vocabulary, int(random.integers(1, 18))).tolist()
        if requests and random.random() < 0.6:
            other = requests[int(random.integers(len(requests)))].prompt
            prompt = [*other[: int(random.integers(1, len(other) + 1))], *prompt[: int(random.integers(0, 8))]]
        options = Options(
            max_new_tokens=int(random.integers(0, 9)),
            sampling=sampling[int(random.integers(len(sampling)))],
            stop_ids=frozenset(random.integers(0, vocabulary, int(random.integers(0, 2))).tolist()),
        )
        patience = int(random.integers(0, 6)) if random.random() < 0.2 else None
        requests.append(Request(tuple(prompt), options, index, int(random.integers(0, 20)), patience))
    return requests


def assert_alone(requests: Sequence[Request], schedule: Schedule, alone: Batch) -> None:
    """Assert that every request got the tokens that it gets alone; a dropped one, the first of them."""
    for request, sequence in zip(requests, schedule.sequences, strict=True):
        expected = request.begin()
        alone.add(expected)
        while alone.rows:
            alone.round()
        if sequence.ending == "interrupted":
            assert sequence.new == expected.new[: len(sequence.new)]
        else:
            assert (sequence.new, sequence.ending) == (expected.new, expected.ending), request


GREEDY = (Sampling(),)
SAMPLED = (Sampling(), Sampling(1.0, seed=3), Sampling(0.8, top_k=4), Sampling(1.2, top_p=0.7, seed=5))


class Wrong:
    """Drafts nothing that would follow."""

    def propose(
        self, engine: Engine, sequences: Sequence[Running | None], lengths: Array, count: int
    ) -> list[list[Draft]]:
        return [[Draft(0, certain(0))] * count if s is not None else [] for s in sequences]


@pytest.mark.parametrize("drafts", ["none", "mtp", "wrong"])
@pytest.mark.parametrize("memory", [0, 2_000, 10**6])
@pytest.mark.parametrize("seed", range(12))
def test_random_schedules_give_what_each_request_gives_alone(
    drafts: Literal["none", "mtp", "wrong"], memory: int, seed: int
) -> None:
    """Arrivals, lengths, drops, common prefixes, drafts, all batch sizes, with a cache that holds a little or all.

    Without drafts, and with those of the model itself, sampled tokens are the same too: random numbers are drawn alike.
    """
    random = np.random.default_rng(seed)
    model, drafter_model = table(VOCAB, seed), table(VOCAB, seed + 1)

    def batch(sizes: Sequence[int], cached: bool) -> Batch:
        engine = FakeEngine(model, batch_sizes=sizes, chunk=CHUNK, draft_tokens=2, drafts=drafter_model)
        drafter: Drafter | None = {"none": None, "mtp": MtpDrafter(), "wrong": Wrong()}[drafts]
        return Batch(engine, CAPACITY, drafter, PrefixCache(memory, drafter is not None) if cached else None)

    requests = drawn(random, 12, VOCAB, GREEDY if drafts == "wrong" else SAMPLED)
    running = batch(SIZES, cached=True)
    schedule = scheduled(requests, running)
    assert running.cache is not None and running.cache.bytes <= memory
    assert_alone(requests, schedule, batch((1,), cached=False))
    if memory == 10**6:
        assert running.cache.hits > 0


def test_the_smallest_batch_size_that_holds_the_sequences_is_used() -> None:
    engine = FakeEngine(table(VOCAB), batch_sizes=SIZES, chunk=CHUNK)
    batch = Batch(engine, CAPACITY)
    requests = [Request((1, 2), Options(max_new_tokens=n), 0, 0, None) for n in (12, 3, 6)]
    scheduled(requests, batch)
    decoded = [size for size, entry in zip(engine.sizes, engine.calls, strict=True) if entry == "decode"]
    assert decoded == [4, 4, 2, 2, 2, *[1] * 6]


def test_a_long_prompt_delays_the_others_by_a_chunk_a_round() -> None:
    engine = FakeEngine(table(VOCAB), batch_sizes=SIZES, chunk=CHUNK)
    batch = Batch(engine, CAPACITY)
    first = Request((1, 2), Options(max_new_tokens=30), 0, 0, None).begin()
    batch.add(first)
    batch.round()
    batch.add(Request(tuple(range(11)) * 4, Options(max_new_tokens=3), 0, 0, None).begin())
    for _ in range(10):
        before = len(first.new)
        batch.round()
        assert len(first.new) == before + 1


def test_a_turn_of_a_chat_goes_on_from_the_one_before() -> None:
    """Only what is new is read: the answer's last token, which no state holds yet, and the next message."""
    for drafter in (None, MtpDrafter()):
        engine = FakeEngine(table(VOCAB), batch_sizes=(1,), chunk=CHUNK)
        batch = Batch(engine, CAPACITY, drafter, PrefixCache(10**6, drafter is not None))
        tokens: list[int] = [1, 2, 3, 4, 5]
        for message in ([6], [7, 8]):
            sequence = Request((*tokens, *message), Options(max_new_tokens=6), 0, 0, None).begin()
            batch.add(sequence)
            read_before = sequence.read
            while batch.rows:
                batch.round()
            tokens = sequence.tokens
        assert read_before >= 5 + 1 + 6 - 3
        assert batch.cache is not None and batch.cache.hits == 1


def test_a_state_restored_one_token_late_is_noticed() -> None:
    """The stand-in and these tests see it: states that are put back where they do not belong."""
    engine = FakeEngine(table(VOCAB), batch_sizes=(1,), chunk=CHUNK)
    cache = PrefixCache(10**6, drafts=False)
    batch = Batch(engine, CAPACITY, None, cache)
    prompt = (1, 2, 3, 4, 5, 6, 7, 8, 9)
    for late in (False, True):
        sequence = Request(prompt, Options(max_new_tokens=2), 0, 0, None).begin()
        batch.add(sequence)
        if late:
            assert sequence.read == 8
            sequence.read -= 1
            with pytest.raises(AssertionError):
                batch.round()
            return
        while batch.rows:
            batch.round()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    return small_model(tmp_path_factory.mktemp("batch"))


@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize("name", ["onnxruntime", "torch"])
def test_real_engines_under_random_schedules(name: Any, drafts: bool, small: SmallModel) -> None:
    """The same of a model with Mamba-2, attention and experts; greedy, since another batch size rounds otherwise."""
    capacity, random = Capacity.of(small.spec), np.random.default_rng(5)

    def batch(sizes: Sequence[int], memory: int | None) -> Batch:
        drafter = MtpDrafter() if drafts else None
        cache = None if memory is None else PrefixCache(memory, drafts)
        return Batch(small.engine(name, *sizes), capacity, drafter, cache)

    alone, memories = batch((1,), None), (0, 200_000, 10**9)
    for memory in memories:
        running = batch((1, 3), memory)
        requests = [replace(r, prompt=r.prompt[:30]) for r in drawn(random, 14, 97, GREEDY)]
        assert_alone(requests, scheduled(requests, running), alone)
        assert running.cache is not None
        assert running.cache.bytes <= memory
        assert (running.cache.hits > 0) == (memory > 0)
