"""One request with all of its prompts at hand: they are read, and then continued together to their ends."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from n3c.runtime.engines.interface import Engine

from .batch import Batch, Taken
from .capacity import Capacity
from .drafter import Drafter
from .result import Completion, Generated, Piece
from .sequence import Options, Running
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

    def __post_init__(self) -> None:
        self.capacity.require(self.prompts, self.engine.batch)
        self.sequences = [Running.begin(p, i, self.options, self.tokenizer) for i, p in enumerate(self.prompts)]

    def run(self) -> None:
        """Continue every sequence to its end. KeyboardInterrupt is passed on; the engine can serve the next request.

        Raises N3CError (exit code 5) where logits are not finite.
        """
        for _ in self.steps():
            pass

    def steps(self) -> Iterator[list[Piece]]:
        """Do what `run` does, and yield the new pieces after prefill and after each round."""
        batch, statistics = Batch(self.engine, self.capacity, self.drafter, interleaved=False), self.statistics
        try:
            start = time.perf_counter()
            for sequence in self.sequences:
                batch.add(sequence)
            taken: list[Taken] = []
            while not all(sequence.is_read for sequence in self.sequences):
                taken += self._round(batch)
            statistics.prompt_tokens = sum(len(sequence.prompt) for sequence in self.sequences)
            statistics.prefill_seconds = time.perf_counter() - start
            yield self._pieces(taken)
            while any(sequence.ending is None for sequence in self.sequences):
                start = time.perf_counter()
                try:
                    taken = self._round(batch)
                finally:
                    statistics.decode_seconds += time.perf_counter() - start
                statistics.rounds, statistics.decoded = batch.rounds, batch.decoded
                yield self._pieces(taken)
        except KeyboardInterrupt:
            self.interrupt()
            raise

    def _round(self, batch: Batch) -> list[Taken]:
        taken = batch.round()
        failure = next((s.failure for s in self.sequences if s.failure is not None), None)
        if failure is not None:
            raise failure
        return taken

    def interrupt(self) -> None:
        """End every running sequence where it is."""
        for sequence in self.sequences:
            sequence.interrupt()

    def _pieces(self, taken: Sequence[Taken]) -> list[Piece]:
        self.statistics.new_tokens += len(taken)
        index = {id(sequence): i for i, sequence in enumerate(self.sequences)}
        return [Piece(index[id(each.sequence)], each.token, each.text) for each in taken]

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
