"""The generation loop: chunked prefill, then token by token, or draft and verify.

Sequences of a batch have different lengths and end independently. Rows of the engine's batch that are free, or
whose sequence has ended, are fed zeros, which no other row sees.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from n3c.runtime.engines.interface import Array, Engine, call

from .capacity import Capacity
from .drafter import Drafter
from .result import Completion, Generated, Piece
from .sequence import Options, Running
from .speculative import Draft, judge
from .tokenizer import Tokenizer


@dataclass(slots=True)
class Statistics:
    """Counts and times of a request."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    rounds: int = 0
    """Rounds, counted for each sequence: one gives a token, with speculation also the accepted drafts."""
    decoded: int = 0
    """Tokens that the rounds gave and that are returned, so none after a stop or a limit."""

    @property
    def tokens_per_second(self) -> float:
        """New tokens a second after prefill, of all sequences together, without the first token of each."""
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
    capacity: Capacity
    tokenizer: Tokenizer | None = None
    drafter: Drafter | None = None
    """None: no speculation."""
    device: str = "cpu"
    """Device of the engine, for the result."""
    engine_name: str = ""
    """Likewise."""
    sequences: list[Running] = field(init=False)
    statistics: Statistics = field(default_factory=Statistics)
    _pieces: list[Piece] = field(default_factory=list[Piece], init=False)
    """Tokens of the current step."""

    def __post_init__(self) -> None:
        self.capacity.require(self.prompts, self.engine.batch)
        self.sequences = [Running.begin(p, i, self.options, self.tokenizer) for i, p in enumerate(self.prompts)]

    def run(self) -> None:
        """Continue every sequence to its end. KeyboardInterrupt is passed on; the engine can serve the next request."""
        for _ in self.steps():
            pass

    def steps(self) -> Iterator[list[Piece]]:
        """Do what `run` does, and yield the new pieces after prefill and after each round."""
        try:
            self.engine.reset()
            start = time.perf_counter()
            self._prefill()
            self.statistics.prefill_seconds = time.perf_counter() - start
            yield self._new_pieces()
            while any(s.ending is None for s in self.sequences):
                start = time.perf_counter()
                try:
                    self._decode() if self.drafter is None else self._speculate(self.drafter)
                finally:
                    self.statistics.decode_seconds += time.perf_counter() - start
                yield self._new_pieces()
        except KeyboardInterrupt:
            self.interrupt()
            raise

    def interrupt(self) -> None:
        """End every running sequence where it is."""
        for sequence in self.sequences:
            sequence.interrupt()

    def _new_pieces(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return pieces

    def result(self) -> Generated:
        """Return the result so far: complete after `run`, partial after an interrupt."""
        statistics = self.statistics
        return Generated(
            completions=tuple(Completion(s.text, tuple(s.new), s.ending, len(s.prompt)) for s in self.sequences),
            device=self.device,
            engine=self.engine_name,
            speculative=self.drafter is not None,
            prompt_tokens=statistics.prompt_tokens,
            new_tokens=statistics.new_tokens,
            tokens_per_second=statistics.tokens_per_second,
            acceptance_length=statistics.acceptance_length,
            prefill_seconds=statistics.prefill_seconds,
            decode_seconds=statistics.decode_seconds,
            allocated=self.engine.allocated(),
        )

    def _prefill(self) -> None:
        """Feed the prompts by chunks; each sequence gets its first token from the chunk in which its prompt ends."""
        chunk = self.engine.signatures["prefill"].inputs["input_ids"].shape[1]
        assert isinstance(chunk, int)
        for begin in range(0, max(len(s.prompt) for s in self.sequences), chunk):
            outputs = call(self.engine, "prefill", **self._prompt_chunk(begin, begin + chunk))
            for i, sequence in enumerate(self.sequences):
                if begin < len(sequence.prompt) <= begin + chunk:
                    self._begin(i, {name: value[i, 0] for name, value in outputs.items()})
        self.statistics.prompt_tokens = sum(len(s.prompt) for s in self.sequences)

    def _prompt_chunk(self, begin: int, end: int) -> dict[str, Array]:
        """Return the inputs of `prefill` for the places from `begin` to `end` of every prompt."""
        size = end - begin
        inputs = {
            "input_ids": self._zeros(size),
            "following_ids": self._zeros(size),
            "counts": self._zeros(),
            "lengths": self._zeros(),
        }
        for i, sequence in enumerate(self.sequences):
            tokens, following = sequence.prompt[begin:end], sequence.prompt[begin + 1 : end + 1]
            inputs["input_ids"][i, : len(tokens)] = tokens
            inputs["following_ids"][i, : len(following)] = following
            inputs["counts"][i] = len(tokens)
            inputs["lengths"][i] = min(begin, len(sequence.prompt))
        return inputs

    def _begin(self, index: int, last: Mapping[str, Array]) -> None:
        """Give a sequence its first token, unless its limit is reached; `last` are the outputs at its prompt's end."""
        sequence = self.sequences[index]
        sequence.hidden = last.get("hidden")
        if self.options.max_new_tokens == 0 or len(sequence.tokens) >= self.capacity.context_length:
            sequence.ending = "length"
        else:
            self._draw(index, last["logits"])

    def _decode(self) -> None:
        """Give every running sequence one token."""
        ids, lengths = self._zeros(1), self._zeros()
        running = [i for i, s in enumerate(self.sequences) if s.ending is None]
        for i in running:
            ids[i, 0], lengths[i] = self.sequences[i].tokens[-1], self.sequences[i].committed
        outputs = call(self.engine, "decode", input_ids=ids, lengths=lengths)
        for i in running:
            self._draw(i, outputs["logits"][i, 0])
            self._count(1)

    def _speculate(self, drafter: Drafter) -> None:
        """Draft, verify, and keep what the rule accepts: one round of every running sequence."""
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
            if sequence is not None:
                self._accept(i, proposals[i], {name: value[i] for name, value in outputs.items()})

    def _accept(self, index: int, drafts: Sequence[Draft], outputs: Mapping[str, Array]) -> None:
        """Judge the drafts of a sequence by the outputs of `verify`, and take those that stand and one token more."""
        sequence = self.sequences[index]
        verdict = judge(drafts, sequence.choices(drafts, outputs["logits"]), sequence.generator)
        sequence.pending = 1 + verdict.accepted
        sequence.hidden = outputs["hidden"][verdict.accepted]
        taken = 0
        for token in (*(draft.token for draft in drafts[: verdict.accepted]), verdict.following):
            if sequence.ending is None:
                self._take(index, token)
                taken += 1
        self._count(taken)

    def _draw(self, index: int, logits: Array) -> None:
        sequence = self.sequences[index]
        self._take(index, sequence.choice(logits, sequence.reasoning).draw(sequence.generator))

    def _take(self, index: int, token: int) -> None:
        piece = self.sequences[index].take(token, self.capacity.context_length)
        self.statistics.new_tokens += 1
        self._pieces.append(Piece(index, token, piece))

    def _count(self, tokens: int) -> None:
        self.statistics.rounds += 1
        self.statistics.decoded += tokens

    def _zeros(self, *dims: int) -> Array:
        return np.zeros((self.engine.batch, *dims), np.int64)
