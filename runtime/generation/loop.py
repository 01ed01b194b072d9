"""The generation loop: chunked prefill, then token by token, or draft and verify.

Sequences of a batch have their own lengths and end by themselves; places of the engine's batch that are
free, or whose sequence has ended, are fed zeros that no other place sees.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from n3c.runtime.engines.interface import Array, Engine, call

from .drafter import Drafter
from .limits import Room
from .sampling import draw
from .sequence import Options, Running
from .speculative import judge
from .tokenizer import Tokenizer

Listener = Callable[[int, int, str], None]
"""Called with the index of a sequence, its new token, and the text that became certain."""


@dataclass(slots=True)
class Statistics:
    """What generating took."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    rounds: int = 0
    """Of a sequence: each gives one token, or with speculation one and those that were accepted."""
    decoded: int = 0
    """Tokens that the rounds gave."""

    @property
    def tokens_per_second(self) -> float:
        """New tokens behind the first of each sequence, in the time after prefill; all sequences together."""
        return self.decoded / self.decode_seconds if self.decode_seconds > 0 else 0.0

    @property
    def acceptance_length(self) -> float:
        """Tokens a round: 1 without speculation, at most 1 + draft tokens with it."""
        return self.decoded / self.rounds if self.rounds else 1.0


@dataclass(slots=True)
class Generation:
    """One request: prompts, continued by `run`. After an interrupt `sequences` hold what there is."""

    engine: Engine
    prompts: Sequence[Sequence[int]]
    options: Options
    room: Room
    tokenizer: Tokenizer | None = None
    drafter: Drafter | None = None
    """None: no speculation."""
    listener: Listener | None = None
    sequences: list[Running] = field(init=False)
    statistics: Statistics = field(default_factory=Statistics)

    def __post_init__(self) -> None:
        self.room.require(self.prompts, self.engine.batch)
        self.sequences = [Running.begin(p, i, self.options, self.tokenizer) for i, p in enumerate(self.prompts)]

    def run(self) -> None:
        """Continue every sequence to its end. KeyboardInterrupt is passed on; the engine may serve the next request."""
        self.engine.reset()
        try:
            start = time.perf_counter()
            self._prefill()
            self.statistics.prefill_seconds = time.perf_counter() - start
            start = time.perf_counter()
            try:
                while any(s.ending is None for s in self.sequences):
                    self._decode() if self.drafter is None else self._speculate(self.drafter)
            finally:
                self.statistics.decode_seconds = time.perf_counter() - start
        except KeyboardInterrupt:
            for sequence in self.sequences:
                sequence.ending = sequence.ending or "interrupted"
            raise

    def _prefill(self) -> None:
        """Feed the prompts by chunks; each sequence gets its first token from the chunk in which its prompt ends."""
        chunk = self.engine.signatures["prefill"].inputs["input_ids"].shape[1]
        assert isinstance(chunk, int)
        for begin in range(0, max(len(s.prompt) for s in self.sequences), chunk):
            ids, following = self._zeros(chunk), self._zeros(chunk)
            counts, lengths = self._zeros(), self._zeros()
            for i, sequence in enumerate(self.sequences):
                part, shifted = (sequence.prompt[begin + n :][:chunk] for n in (0, 1))
                ids[i, : len(part)], following[i, : len(shifted)] = part, shifted
                counts[i], lengths[i] = len(part), min(begin, len(sequence.prompt))
            outputs = call(
                self.engine, "prefill", input_ids=ids, counts=counts, lengths=lengths, following_ids=following
            )
            for i, sequence in enumerate(self.sequences):
                if begin < len(sequence.prompt) <= begin + chunk:
                    if "hidden" in outputs:
                        sequence.hidden = outputs["hidden"][i, 0]
                    if self.options.max_new_tokens == 0 or len(sequence.tokens) >= self.room.tokens:
                        sequence.ending = "length"
                    else:
                        self._draw(i, outputs["logits"][i, 0])
        self.statistics.prompt_tokens = sum(len(s.prompt) for s in self.sequences)

    def _decode(self) -> None:
        """Give every sequence that runs one token."""
        ids, lengths = self._zeros(1), self._zeros()
        running = [i for i, s in enumerate(self.sequences) if s.ending is None]
        for i in running:
            ids[i, 0], lengths[i] = self.sequences[i].tokens[-1], self.sequences[i].committed
        outputs = call(self.engine, "decode", input_ids=ids, lengths=lengths)
        for i in running:
            self._draw(i, outputs["logits"][i, 0])
            self._count(1)

    def _speculate(self, drafter: Drafter) -> None:
        """Draft, verify, and keep what the rule accepts: one round of every sequence that runs."""
        tokens = self.engine.signatures["verify"].inputs["input_ids"].shape[1]
        assert isinstance(tokens, int)
        running = [s if s.ending is None else None for s in self.sequences]
        proposals = drafter.propose(self.engine, running, tokens - 1)
        ids, lengths, accepted = self._zeros(tokens), self._zeros(), self._zeros()
        for i, sequence in enumerate(running):
            if sequence is not None:
                ids[i] = [sequence.tokens[-1], *(draft.token for draft in proposals[i])]
                lengths[i], accepted[i] = sequence.committed, sequence.pending
        following = np.roll(ids, -1, axis=1)
        following[:, -1] = 0
        outputs = call(
            self.engine, "verify", input_ids=ids, following_ids=following, lengths=lengths, accepted=accepted
        )
        for i, sequence in enumerate(running):
            if sequence is None:
                continue
            logits, states = outputs["logits"][i], [sequence.reasoning]
            for draft in proposals[i]:
                states.append(states[-1].after(draft.token) if states[-1] is not None else None)
            verdict = judge(
                proposals[i],
                lambda n, s=sequence, x=logits, r=states: s.choice(x[n], r[n]),  # type: ignore[misc]
                sequence.generator,
            )
            sequence.pending = 1 + verdict.accepted
            sequence.hidden = outputs["hidden"][i, verdict.accepted]
            self._count(1 + verdict.accepted)
            for token in (*(draft.token for draft in proposals[i][: verdict.accepted]), verdict.following):
                if sequence.ending is None:
                    self._take(i, token)

    def _draw(self, index: int, logits: Array) -> None:
        sequence = self.sequences[index]
        self._take(index, draw(sequence.choice(logits, sequence.reasoning), sequence.generator))

    def _take(self, index: int, token: int) -> None:
        piece = self.sequences[index].take(token, self.room.tokens)
        self.statistics.new_tokens += 1
        if self.listener is not None:
            self.listener(index, token, piece)

    def _count(self, tokens: int) -> None:
        self.statistics.rounds += 1
        self.statistics.decoded += tokens

    def _zeros(self, *dims: int) -> Array:
        return np.zeros((self.engine.batch, *dims), np.int64)
