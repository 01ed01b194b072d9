"""One replica of a service on a virtual clock: requests wait, run and end by the scheduler of the server."""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from n3c.ir.diagnostics import N3CError
from n3c.passes.state_layout import StatePlan
from n3c.runtime.generation.batch import Batch
from n3c.runtime.generation.capacity import Capacity
from n3c.runtime.generation.drafter import MtpDrafter
from n3c.runtime.generation.prefix_cache import PrefixCache
from n3c.runtime.generation.sequence import Options
from n3c.runtime.serve.scheduler import Scheduler, Ticket, Token, Update, Work
from n3c.specs.schema import Serving

from .call_times import CallTimes
from .engine import SimulatedEngine, VirtualClock, standing
from .quiet_rounds import pass_quiet_rounds
from .workload import TOKENS, Request

NO_TEXT = Token(1, "", None)
"""A token of a round that was not run."""


@dataclass(slots=True)
class Answered:
    """What happened to a request; times in seconds from the start."""

    request: Request
    ticket: Ticket | None = None
    tokens: int = 0

    @property
    def first(self) -> float:
        """When its first token was there."""
        assert self.ticket is not None and self.ticket.first_token is not None
        return self.ticket.first_token

    @property
    def last(self) -> float:
        """When its last token was there."""
        assert self.ticket is not None and self.ticket.last_token is not None
        return self.ticket.last_token

    @property
    def found(self) -> int:
        """Tokens of its prompt that the cache had."""
        return 0 if self.ticket is None else self.ticket.cached_tokens

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
    """What is true after a round, or after some that were added up."""

    now: float
    tokens: int
    """New ones, of all sequences."""
    running: int
    busy: float
    """Seconds that the engine has computed since the start."""
    count: int = 1


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
    paper: SimulatedEngine | None = None
    """The engine, where it computes nothing: then rounds are added up as far as they can be."""
    answered: list[Answered] = field(default_factory=list[Answered], init=False)
    """In the order in which they came."""
    refused: int = field(default=0, init=False)
    """Requests whose prompts are longer than the model's context."""
    rounds: list[Round] = field(default_factory=list[Round], init=False)
    waiting_at_end: int = field(default=0, init=False)
    """Requests that had no row yet when the last one came."""
    _tokens: int = field(default=0, init=False)
    """New ones since the last round that was noted."""
    _failure: N3CError | None = field(default=None, init=False)
    _refusal: N3CError | None = field(default=None, init=False)

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
        capacity = Capacity(serving.max_seq_len + min(0, 1 - plan.draft_tokens), TOKENS)
        cache = None if cache_memory is None else PrefixCache(cache_memory, drafts)
        batch = Batch(engine, capacity, MtpDrafter() if drafts else None, cache)
        return Replica(batch, clock, lambda: engine.busy, engine)

    def run(self, requests: Iterable[Request]) -> None:
        """Answer requests, which come in the order of their times.

        N3CError: exit code 2 where no prompt fits, else what the engine fails with.
        """
        coming, clock, batch = deque(requests), self.clock, self.batch
        scheduler = Scheduler(batch, None, sys.maxsize - batch.engine.batch, clock=lambda: clock.now)
        while coming or not scheduler.idle:
            if scheduler.idle:
                clock.now = max(clock.now, coming[0].at)
            while coming and coming[0].at <= clock.now:
                self._submit(scheduler, coming.popleft())
                if not coming:
                    self.waiting_at_end = max(0, len(scheduler.waiting) - batch.free)
            if self.paper is not None and not (scheduler.waiting and batch.free):
                self._pass_quiet_rounds(scheduler, self.paper, coming[0].at if coming else math.inf)
            scheduler.step()
            if self._failure is not None:
                raise self._failure
            self._note(1)
        if self._refusal is not None and not self.answered:
            raise self._refusal

    def _pass_quiet_rounds(self, scheduler: Scheduler, engine: SimulatedEngine, until: float) -> None:
        quiet = pass_quiet_rounds(self.batch, engine, until)
        if quiet is not None:
            for sequence, tokens in zip(self.batch.rows, quiet.tokens, strict=True):
                ticket = scheduler.running[id(sequence)]
                ticket.last_token = self.clock.now
                ticket.deliver(Update((NO_TEXT,) * tokens))
            self._note(quiet.rounds)

    def _note(self, rounds: int) -> None:
        self.rounds.append(Round(self.clock.now, self._tokens, len(self.batch.rows), self.busy(), rounds))
        self._tokens = 0

    def _submit(self, scheduler: Scheduler, request: Request) -> None:
        answered = Answered(request)
        options = Options(max_new_tokens=request.output_tokens)
        work = Work(request.prompt, options, len(self.answered))

        def told(update: Update) -> None:
            answered.tokens += len(update.tokens)
            self._tokens += len(update.tokens)
            self._failure = update.failure or self._failure

        try:
            answered.ticket = scheduler.ticket(work, told)
        except N3CError as error:
            self.refused += 1
            self._refusal = error
        else:
            self.answered.append(answered)
            scheduler.submit(answered.ticket)
