"""One replica of a service on a virtual clock: requests wait, run in the batch of serving, and end."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from n3c.passes.state_layout import StatePlan
from n3c.runtime.generation.batch import Batch
from n3c.runtime.generation.capacity import Capacity
from n3c.runtime.generation.drafter import MtpDrafter
from n3c.runtime.generation.prefix_cache import PrefixCache
from n3c.runtime.generation.sequence import Options, Running
from n3c.specs.schema import Serving

from .call_times import CallTimes
from .engine import VOCABULARY, SimulatedEngine, VirtualClock, standing
from .workload import Request


@dataclass(slots=True)
class Answered:
    """What happened to a request; times in seconds from the start."""

    request: Request
    first: float = 0.0
    """When its first token was there."""
    last: float = 0.0
    tokens: int = 0
    found: int = 0
    """Tokens of its prompt that the cache had."""

    @property
    def to_first(self) -> float:
        """Seconds from its coming to its first token."""
        return self.first - self.request.at

    @property
    def a_token(self) -> float | None:
        """Seconds of a token after the first; None for one alone."""
        return (self.last - self.first) / (self.tokens - 1) if self.tokens > 1 else None


@dataclass(frozen=True, slots=True)
class Round:
    """What is true after a round."""

    now: float
    tokens: int
    """New ones, of all sequences."""
    running: int
    busy: float
    """Seconds that the engine has computed since the start."""


class Clock(Protocol):
    """Tells the time; where nothing is to be done it is set to when there will be."""

    now: float
    """Seconds from the start."""


@dataclass(slots=True)
class Replica:
    """A batch that answers requests as they come by its clock: that of its engine, where that computes nothing."""

    batch: Batch
    clock: Clock
    busy: Callable[[], float]
    """Returns the seconds that the engine has computed."""
    answered: list[Answered] = field(default_factory=list[Answered], init=False)
    """In the order in which they came."""
    rounds: list[Round] = field(default_factory=list[Round], init=False)
    waiting_at_end: int = field(default=0, init=False)
    """Requests that had no row yet when the last one came."""

    @staticmethod
    def of(
        serving: Serving,
        plan: StatePlan,
        times: CallTimes,
        *,
        acceptance: float | None,
        cache_memory: int | None,
        seed: int = 0,
    ) -> Replica:
        """Return an idle replica on paper, as `serving` sizes it.

        `acceptance` are the tokens of a round, from 1 to 1 + draft tokens; None: no drafts. `cache_memory` is in bytes;
        None: no prefix is kept.
        """
        stands = 0.0 if acceptance is None else standing(acceptance, plan.draft_tokens)
        clock = VirtualClock()
        engine = SimulatedEngine(plan, serving.batch_sizes, serving.prefill_chunk, times, stands, clock, seed=seed)
        drafts = acceptance is not None
        capacity = Capacity(serving.max_seq_len + min(0, 1 - plan.draft_tokens), VOCABULARY)
        cache = None if cache_memory is None else PrefixCache(cache_memory, drafts)
        batch = Batch(engine, capacity, MtpDrafter() if drafts else None, cache)
        return Replica(batch, clock, lambda: engine.busy)

    def run(self, requests: Iterable[Request]) -> None:
        """Answer requests, which come in the order of their times."""
        coming, waiting = deque(requests), deque[tuple[Running, Answered]]()
        running: dict[int, Answered] = {}
        clock, batch = self.clock, self.batch
        while coming or waiting or batch.rows:
            if not (waiting or batch.rows):
                clock.now = max(clock.now, coming[0].at)
            while coming and coming[0].at <= clock.now:
                waiting.append(self._begin(coming.popleft()))
                if not coming:
                    self.waiting_at_end = max(0, len(waiting) - batch.free)
            while waiting and batch.free:
                sequence, answered = waiting.popleft()
                batch.add(sequence)
                answered.found = sequence.read
                running[id(sequence)] = answered
            taken = batch.round()
            for each in taken:
                answered = running[id(each.sequence)]
                if not answered.tokens:
                    answered.first = clock.now
                answered.last = clock.now
                answered.tokens += 1
            self.rounds.append(Round(clock.now, len(taken), len(batch.rows), self.busy()))

    def _begin(self, request: Request) -> tuple[Running, Answered]:
        answered = Answered(request)
        self.answered.append(answered)
        options = Options(max_new_tokens=request.output_tokens)
        return Running.begin(request.prompt, len(self.answered), options, None), answered
