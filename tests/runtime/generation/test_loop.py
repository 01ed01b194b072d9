"""Generation over an engine that checks every length: prefill, decoding, speculation, ragged batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from n3c.ir.diagnostics import ExitCode, N3CError
from n3c.runtime.engines.interface import Array, Engine
from n3c.runtime.generation.capacity import Capacity
from n3c.runtime.generation.distribution import Distribution, certain
from n3c.runtime.generation.drafter import Drafter, MtpDrafter
from n3c.runtime.generation.loop import Generation
from n3c.runtime.generation.sampling import Sampling, distribution
from n3c.runtime.generation.sequence import Options, Running
from n3c.runtime.generation.speculative import Draft
from n3c.runtime.generation.tokenizer import ByteTokenizer
from support.fake_engine import FakeEngine, Logits, table

VOCAB = 11
CAPACITY = Capacity(context_length=64, vocab_size=VOCAB)


class Adversary:
    """Drafts that are always wrong, always right, or random: any pattern of acceptance."""

    def __init__(self, model: Logits, kind: Literal["wrong", "right", "random"], seed: int = 0) -> None:
        self.model, self.kind, self.random = model, kind, np.random.default_rng(seed)

    def propose(
        self, engine: Engine, sequences: Sequence[Running | None], lengths: Array, count: int
    ) -> list[list[Draft]]:
        return [self._drafts(list(s.tokens), count) if s is not None else [] for s in sequences]

    def _drafts(self, tokens: list[int], count: int) -> list[Draft]:
        drafts: list[Draft] = []
        for _ in range(count):
            best = int(np.argmax(self.model(tokens)))
            wrong = (best + 1 + int(self.random.integers(VOCAB - 1))) % VOCAB
            token = {"right": best, "wrong": wrong, "random": best if self.random.random() < 0.6 else wrong}[self.kind]
            tokens.append(token)
            drafts.append(Draft(token, certain(token)))
        return drafts


def plain(model: Logits, prompt: Sequence[int], count: int) -> list[int]:
    """Decode greedily with the model itself, without any engine."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(np.argmax(model(tokens))))
    return tokens[len(prompt) :]


def generated(
    engine: FakeEngine, prompts: Sequence[Sequence[int]], options: Options, drafter: Drafter | None = None
) -> Generation:
    generation = Generation(engine, prompts, options, CAPACITY, drafter=drafter)
    generation.run()
    return generation


prompts_of_a_batch = st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=11), min_size=1, max_size=4)


@settings(max_examples=60)
@given(
    prompts=prompts_of_a_batch,
    kind=st.sampled_from(["wrong", "right", "random", "mtp", "none"]),
    draft_tokens=st.integers(1, 5),
    chunk=st.integers(1, 6),
    seed=st.integers(0, 1000),
)
def test_greedy_output_is_the_same_whatever_is_drafted(
    prompts: list[list[int]],
    kind: Literal["wrong", "right", "random", "mtp", "none"],
    draft_tokens: int,
    chunk: int,
    seed: int,
) -> None:
    """Every pattern of acceptance, in batches whose sequences accept differently, and places that are free."""
    model = table(VOCAB, seed)
    engine = FakeEngine(model, batch=4, chunk=chunk, draft_tokens=draft_tokens, drafts=table(VOCAB, seed, scale=1.0))
    drafter: Drafter | None = None
    if kind == "mtp":
        drafter = MtpDrafter()
    elif kind != "none":
        drafter = Adversary(model, kind, seed)
    done = generated(engine, prompts, Options(max_new_tokens=13), drafter)
    assert [s.new for s in done.sequences] == [plain(model, prompt, 13) for prompt in prompts]
    assert all(s.ending == "length" for s in done.sequences)


@pytest.mark.parametrize(("kind", "expected"), [("wrong", 1.0), ("right", 4.0)])
def test_acceptance_length_counts_tokens_a_round(kind: Literal["wrong", "right"], expected: float) -> None:
    model = table(VOCAB)
    engine = FakeEngine(model, draft_tokens=3)
    done = generated(engine, [[1, 2, 3]], Options(max_new_tokens=17), Adversary(model, kind))
    assert done.statistics.acceptance_length == expected
    assert engine.calls.count("verify") == 16 / expected


def test_times_are_those_of_prefill_and_of_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that calls move on: a chunk takes 1 second, a token 4, and the first token comes of the last chunk."""
    seconds = 100.0

    class Slow(FakeEngine):
        def run(self, entry: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
            nonlocal seconds
            seconds += {"prefill": 1, "decode": 4}[entry]
            return super().run(entry, inputs)

    monkeypatch.setattr("time.perf_counter", lambda: seconds)
    done = generated(Slow(table(VOCAB), chunk=2), [[1, 2, 3, 4, 5]], Options(max_new_tokens=4)).result()
    assert (done.prefill_seconds, done.decode_seconds, done.tokens_per_second) == (3, 12, 0.25)
    one = generated(Slow(table(VOCAB), chunk=2), [[1]], Options(max_new_tokens=1)).result()
    assert (one.decode_seconds, one.tokens_per_second, one.acceptance_length) == (0, 0, 1)


def test_the_drafter_of_the_model_is_right_where_it_is_the_model() -> None:
    """With the drafter's logits equal to the model's, each recursion sees what the model will."""
    done = generated(FakeEngine(table(VOCAB), draft_tokens=3), [[4, 1]], Options(max_new_tokens=13), MtpDrafter())
    assert done.statistics.acceptance_length == 4.0


def test_a_state_read_one_token_late_is_noticed() -> None:
    """The check of the fake engine is one: with `accepted` one too small, it fails."""

    class Late(FakeEngine):
        def run(self, entry: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
            given = dict(inputs)
            if entry == "verify":
                given["accepted"] = np.maximum(given["accepted"] - 1, 0)
            return super().run(entry, given)

    with pytest.raises(AssertionError, match="too early or too late"):
        generated(Late(table(VOCAB)), [[1, 2]], Options(max_new_tokens=9), MtpDrafter())


@pytest.mark.parametrize(("limit", "stop"), [(7, None), (20, 5)])
def test_tokens_behind_a_stop_or_limit_are_not_counted(limit: int, stop: int | None) -> None:
    """Rounds of 4 tokens that are all accepted: the last one is cut in its middle."""
    model = table(VOCAB)
    whole = plain(model, [1, 2, 3], 20)
    stops = frozenset[int]() if stop is None else frozenset({whole[stop]})
    returned = limit if stop is None else whole.index(whole[stop]) + 1
    options = Options(max_new_tokens=limit, stop_ids=stops)
    done = generated(FakeEngine(model, draft_tokens=3), [[1, 2, 3]], options, Adversary(model, "right"))
    assert done.sequences[0].new == whole[:returned]
    rounds = -(-(returned - 1) // 4)
    assert (returned - 1) % 4 != 0
    result = done.result()
    assert (done.statistics.rounds, done.statistics.decoded, result.new_tokens) == (rounds, returned - 1, returned)
    assert result.acceptance_length == (returned - 1) / rounds


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9])
def test_a_prompt_may_end_anywhere_in_a_chunk(length: int) -> None:
    model, prompt = table(VOCAB), [i % VOCAB for i in range(length)]
    engine = FakeEngine(model, chunk=4)
    done = generated(engine, [prompt], Options(max_new_tokens=3))
    assert done.sequences[0].new == plain(model, prompt, 3)
    assert engine.calls.count("prefill") == -(-length // 4)


@pytest.mark.parametrize("drafter", [None, MtpDrafter()], ids=["plain", "mtp"])
def test_no_token_where_none_may_follow(drafter: Drafter | None) -> None:
    """Because none is asked for, or because the prompt fills the context; its neighbour goes on."""
    model = table(VOCAB)
    none = generated(FakeEngine(model), [[1, 2]], Options(max_new_tokens=0), drafter)
    assert (none.sequences[0].new, none.sequences[0].ending) == ([], "length")
    engine = FakeEngine(model, batch=2)
    generation = Generation(engine, [[1] * 6, [3]], Options(max_new_tokens=9), Capacity(6, VOCAB), drafter=drafter)
    generation.run()
    assert [s.new for s in generation.sequences] == [[], plain(model, [3], 5)]


def test_text_that_was_kept_back_is_returned_at_the_end() -> None:
    """It began like a stop string; then the limit, a stop id or an interrupt came."""

    def spell(tokens: Sequence[int]) -> Array:
        logits = np.zeros(256, np.float32)
        logits[b"aEN!"[(len(tokens) - 1) % 4]] = 1
        return logits

    def texts(options: Options, interrupt: int = 99) -> tuple[str, str | None]:
        generation = Generation(FakeEngine(spell), [[0]], options, Capacity(64, 256), ByteTokenizer())
        pieces: list[str] = []
        generation = Generation(FakeEngine(spell), [[0]], options, Capacity(64, 256), ByteTokenizer())
        for step in generation.steps():
            pieces += [piece.text for piece in step]
            if len(pieces) == interrupt:
                generation.interrupt()
        return "".join(pieces), generation.result().completions[0].text

    stops = ("END",)
    assert texts(Options(max_new_tokens=3, stop_texts=stops)) == ("aEN", "aEN")
    assert texts(Options(max_new_tokens=9, stop_texts=stops, stop_ids=frozenset(b"!"))) == ("aEN", "aEN")
    assert texts(Options(max_new_tokens=9, stop_texts=stops), interrupt=3) == ("a", "aEN")


def test_a_request_without_prompts_is_refused() -> None:
    with pytest.raises(N3CError, match="E0802") as error:
        Generation(FakeEngine(table(VOCAB)), [], Options(), CAPACITY)
    assert error.value.exit_code == ExitCode.USAGE


def test_prefill_takes_chunks_and_ends_with_each_prompt() -> None:
    engine = FakeEngine(table(VOCAB), batch=3, chunk=4)
    done = generated(engine, [[1] * 9, [2, 3]], Options(max_new_tokens=1))
    assert engine.calls == ["prefill"] * 3
    assert [len(s.new) for s in done.sequences] == [1, 1]
    assert done.statistics.prompt_tokens == 11


def test_the_samples_of_a_sequence_depend_on_its_seed_and_place_only() -> None:
    options = Options(max_new_tokens=12, sampling=Sampling(temperature=1.0, seed=3))
    engine = FakeEngine(table(VOCAB), batch=2)
    both = generated(engine, [[1, 2], [3]], options)
    alone = generated(FakeEngine(table(VOCAB)), [[1, 2]], options)
    assert both.sequences[0].new == alone.sequences[0].new
    assert generated(engine, [[1, 2], [3]], options).sequences[1].new == both.sequences[1].new
    other = Options(max_new_tokens=12, sampling=Sampling(temperature=1.0, seed=4))
    assert generated(engine, [[1, 2]], other).sequences[0].new != both.sequences[0].new


def chi_square(counts: Array, expected: Array) -> float:
    """Return Pearson's statistic over the cells that are expected at all; none may be hit that is not."""
    possible = expected > 0
    assert counts[~possible].sum() == 0
    return float(((counts[possible] - expected[possible]) ** 2 / expected[possible]).sum())


@pytest.mark.parametrize(
    ("kind", "sampling"),
    [
        ("mtp", Sampling(1.0)),
        ("wrong", Sampling(1.0)),
        ("random", Sampling(1.0)),
        ("mtp", Sampling(0.7, top_k=3)),
        ("random", Sampling(1.3, top_p=0.8)),
    ],
)
def test_sampling_with_speculation_keeps_the_distribution(kind: str, sampling: Sampling) -> None:
    """Pearson's chi-square over all triples of the first three sampled tokens, 4 tokens in the vocabulary.

    64 cells have at most 63 degrees of freedom: 103.4 is exceeded once in a thousand times. The seed is fixed.
    """
    size, rounds, batch = 4, 30, 64
    model = table(size, seed=5, scale=1.0)
    engine = FakeEngine(model, batch=batch, draft_tokens=2, drafts=table(size, seed=6, scale=1.0))
    drafter: Drafter = MtpDrafter()
    if kind != "mtp":
        drafter = _Fixed(size, kind)
    counts = np.zeros((size, size, size))
    for round_ in range(rounds):
        options = Options(
            max_new_tokens=3, sampling=Sampling(sampling.temperature, sampling.top_k, sampling.top_p, round_)
        )
        generation = Generation(engine, [[1, 2]] * batch, options, Capacity(64, size), drafter=drafter)
        generation.run()
        for sequence in generation.sequences:
            counts[tuple(sequence.new)] += 1
    expected = np.zeros_like(counts)
    for a in range(size):
        for b in range(size):
            for c in range(size):
                first, second, third = (
                    distribution(model(prefix), sampling).probability(token)
                    for prefix, token in (([1, 2], a), ([1, 2, a], b), ([1, 2, a, b], c))
                )
                expected[a, b, c] = first * second * third * rounds * batch
    assert chi_square(counts, expected) < 103.4


class _Fixed:
    """Drafts without looking: one token always, or random ones from a distribution that has nothing to do with p."""

    def __init__(self, size: int, kind: str) -> None:
        self.random, self.kind, self.size = np.random.default_rng(9), kind, size

    def propose(
        self, engine: Engine, sequences: Sequence[Running | None], lengths: Array, count: int
    ) -> list[list[Draft]]:
        skewed = np.array([0.7, 0.1, 0.1, 0.1])
        return [[self._draft(skewed) for _ in range(count)] if s is not None else [] for s in sequences]

    def _draft(self, skewed: Array) -> Draft:
        if self.kind == "wrong":
            return Draft(3, certain(3))
        return Draft(int(self.random.choice(self.size, p=skewed)), Distribution(None, skewed))


def test_a_wrong_rule_would_be_noticed() -> None:
    """The statistic has power: accepting every draft of the fixed drafter leaves any bound far behind."""
    counts, expected = np.zeros(4), distribution(table(4, 5, 1.0)([1, 2]), Sampling(1.0)).dense(4) * 1920
    counts[3] = 1920
    assert chi_square(counts, expected) > 500


def test_an_interrupt_leaves_what_there_is_and_an_engine_that_serves_on() -> None:
    model = table(VOCAB)
    engine = FakeEngine(model)
    generation = Generation(engine, [[1, 2]], Options(max_new_tokens=20), CAPACITY, drafter=MtpDrafter())
    calls = 0

    class Interrupting(MtpDrafter):
        def propose(
            self, engine: Engine, sequences: Sequence[Running | None], lengths: Array, count: int
        ) -> list[list[Draft]]:
            nonlocal calls
            calls += 1
            if calls == 4:
                raise KeyboardInterrupt
            return super().propose(engine, sequences, lengths, count)

    generation.drafter = Interrupting()
    with pytest.raises(KeyboardInterrupt):
        generation.run()
    (sequence,) = generation.sequences
    assert sequence.ending == "interrupted"
    assert 4 <= len(sequence.new) < 20
    assert sequence.new == plain(model, [1, 2], len(sequence.new))
    again = generated(engine, [[1, 2]], Options(max_new_tokens=20))
    assert again.sequences[0].new == plain(model, [1, 2], 20)


def test_stop_ids_end_a_sequence_and_not_its_neighbours() -> None:
    model = table(VOCAB)
    expected = [plain(model, prompt, 20) for prompt in ([1, 2], [5])]
    stop = expected[0][4]
    for drafter in (None, MtpDrafter()):
        engine = FakeEngine(model, batch=2, draft_tokens=4)
        done = generated(engine, [[1, 2], [5]], Options(max_new_tokens=20, stop_ids=frozenset({stop})), drafter)
        for sequence, whole in zip(done.sequences, expected, strict=True):
            end = whole.index(stop) + 1 if stop in whole else len(whole)
            assert sequence.new == whole[:end]
            assert sequence.ending == ("stop" if stop in whole else "length")


def test_the_room_of_the_caches_ends_a_sequence() -> None:
    """With 4 drafts, `verify` writes 5 tokens behind the committed ones: the caches of 16 tokens just hold them."""
    model, places = table(VOCAB), list[int]()

    class Bounded(FakeEngine):
        def run(self, entry: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
            given = dict(inputs)
            places.append(int(given["lengths"][0]) + given["input_ids"].shape[1])
            return super().run(entry, given)

    for drafter in (None, MtpDrafter()):
        capacity = Capacity(context_length=13, vocab_size=VOCAB)
        engine = Bounded(model, chunk=2, draft_tokens=4)
        generation = Generation(engine, [[1, 2]], Options(max_new_tokens=99), capacity, drafter=drafter)
        generation.run()
        assert generation.sequences[0].tokens == [1, 2, *plain(model, [1, 2], 11)]
    assert max(places) <= 16
