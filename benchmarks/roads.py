"""Roads through one model that end in the same place: token by token, in chunks, with drafts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from n3c.runtime.engines.interface import Array, Engine, call
from n3c.runtime.generation.batch import Batch
from n3c.runtime.generation.capacity import Capacity
from n3c.runtime.generation.drafter import Drafter
from n3c.runtime.generation.logprobs import TokenLogprobs
from n3c.runtime.generation.sequence import Options, Running

Note = Callable[[range], None]
"""Is told before each call which tokens of the sequence it takes."""


def unheard(_: range) -> None:
    """Note nothing."""


def token_by_token(engine: Engine, ids: Sequence[int], begin: int = 0, note: Note = unheard) -> dict[int, Array]:
    """Decode `ids` from `begin` on, the states holding those before; return the logits [V] behind each."""
    logits: dict[int, Array] = {}
    for at in range(begin, len(ids)):
        note(range(at, at + 1))
        outputs = call(engine, "decode", input_ids=np.array([[ids[at]]]), lengths=np.array([at]))
        logits[at] = outputs["logits"][0, 0]
    return logits


def in_chunks(engine: Engine, ids: Sequence[int], note: Note = unheard) -> dict[int, Array]:
    """Prefill `ids` in chunks of the size that the engine has; return the logits [V] behind each chunk."""
    chunk = engine.signatures["prefill"].inputs["input_ids"].shape[1]
    assert isinstance(chunk, int)
    padded = np.zeros(len(ids) + chunk + 1, np.int64)
    padded[: len(ids)] = ids
    logits: dict[int, Array] = {}
    for at in range(0, len(ids), chunk):
        count = min(chunk, len(ids) - at)
        note(range(at, at + count))
        outputs = call(
            engine,
            "prefill",
            input_ids=padded[None, at : at + chunk],
            following_ids=padded[None, at + 1 : at + 1 + chunk],
            counts=np.array([count]),
            lengths=np.array([at]),
        )
        logits[at + count - 1] = outputs["logits"][0, 0]
    return logits


def by_verification(engine: Engine, ids: Sequence[int], begin: int, note: Note = unheard) -> dict[int, Array]:
    """Verify `ids` from `begin` on as drafts that all stand; return the logits [V] behind each."""
    width = engine.signatures["verify"].inputs["input_ids"].shape[1]
    assert isinstance(width, int)
    padded = np.zeros(len(ids) + width + 1, np.int64)
    padded[: len(ids)] = ids
    logits: dict[int, Array] = {}
    for at in range(begin, len(ids), width):
        note(range(at, min(at + width, len(ids))))
        outputs = call(
            engine,
            "verify",
            input_ids=padded[None, at : at + width],
            following_ids=padded[None, at + 1 : at + 1 + width],
            lengths=np.array([at]),
            accepted=np.array([0 if at == begin else width]),
        )
        logits |= {at + t: outputs["logits"][0, t] for t in range(min(width, len(ids) - at))}
    return logits


def largest_difference(one: Mapping[int, Array], other: Mapping[int, Array]) -> float:
    """Return the largest difference of a logit at the places that both have."""
    places = one.keys() & other.keys()
    assert places
    return max(float(np.abs(one[place] - other[place]).max()) for place in places)


@dataclass(frozen=True, slots=True)
class Continuation:
    """What greedy decoding made of a prompt."""

    tokens: list[int]
    logprobs: list[Array]
    """Of all tokens [V] at each place, float64: differences of them are those of logits."""

    def margin(self, place: int) -> float:
        """Return by how much the likeliest token's logit is above the next one's."""
        first, second = np.sort(self.logprobs[place])[-2:][::-1]
        return float(first - second)


def continued(
    engine: Engine, prompts: Sequence[Sequence[int]], new: int, capacity: Capacity, drafter: Drafter | None
) -> tuple[list[Continuation], float]:
    """Continue all prompts greedily by `new` tokens; return them, and how many tokens a round gave."""
    found: list[Continuation] = []
    rounds = decoded = 0
    for first in range(0, len(prompts), engine.batch):
        batch = Batch(engine, capacity, drafter, interleaved=False)
        options = Options(max_new_tokens=new, logprobs=capacity.vocab_size)
        group = [Running.begin(p, i, options, None) for i, p in enumerate(prompts[first : first + engine.batch])]
        made = {id(sequence): Continuation([], []) for sequence in group}
        for sequence in group:
            batch.add(sequence)
        while batch.rows:
            for taken in batch.round():
                assert taken.logprobs is not None
                made[id(taken.sequence)].tokens.append(taken.token)
                made[id(taken.sequence)].logprobs.append(_dense(taken.logprobs, capacity.vocab_size))
        found += [made[id(sequence)] for sequence in group]
        rounds, decoded = rounds + batch.rounds, decoded + batch.decoded
    return found, decoded / rounds


def _dense(logprobs: TokenLogprobs, vocab_size: int) -> Array:
    dense = np.full(vocab_size, -np.inf)
    for token, value in logprobs.top:
        dense[token] = value
    return dense


@dataclass(frozen=True, slots=True)
class Parting:
    """Where two continuations of a prompt have different tokens for the first time."""

    prompt: int
    place: int
    margin: float
    """Of the first road's logits there."""
    apart: float
    """Largest difference of a log-probability there."""


def partings(one: Sequence[Continuation], other: Sequence[Continuation]) -> tuple[list[Parting], float, float]:
    """Compare continuations of the same prompts up to the first token that differs.

    Return these places, the largest difference of a log-probability at all places before, and the smallest margin
    there.
    """
    found: list[Parting] = []
    largest, smallest = 0.0, float("inf")
    for prompt, (a, b) in enumerate(zip(one, other, strict=True)):
        assert len(a.tokens) == len(b.tokens)
        for place, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=True)):
            apart = float(np.abs(a.logprobs[place] - b.logprobs[place]).max())
            if x != y:
                found.append(Parting(prompt, place, a.margin(place), apart))
                break
            largest, smallest = max(largest, apart), min(smallest, a.margin(place))
    return found, largest, smallest
