"""The requests of a server on one engine, without threads and without HTTP: who waits, who runs, who gets what.

`step` does one round. Whoever calls it decides when: the thread of a `Service`, or a simulation with its own clock.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError
from n3c.runtime.generation.batch import Batch
from n3c.runtime.generation.logprobs import TokenLogprobs
from n3c.runtime.generation.sequence import Ending, Options, Running
from n3c.runtime.generation.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Work:
    """What a sequence is to be: a prompt and how it is continued."""

    prompt: tuple[int, ...]
    options: Options
    index: int = 0
    """Of the choice; random numbers depend on it and on the seed."""


@dataclass(frozen=True, slots=True)
class Token:
    """A new token, and the text that it made certain."""

    id: int
    text: str
    logprobs: TokenLogprobs | None


@dataclass(frozen=True, slots=True)
class Update:
    """What a round brought a sequence; the last one has its ending."""

    tokens: tuple[Token, ...]
    ending: Ending | None = None
    failure: N3CError | None = None


Deliver = Callable[[Update], None]
"""Called by whoever calls `step`; must not block, nor raise."""


@dataclass(slots=True, eq=False)
class Ticket:
    """One sequence of a server, from its submission to its end."""

    work: Work
    deliver: Deliver
    submitted: float
    started: float | None = None
    """When it joined the batch; times are of the scheduler's clock, in seconds."""
    first_token: float | None = None
    last_token: float | None = None
    cached_tokens: int = 0
    """Tokens of the prompt that were found in the cache."""
    sequence: Running | None = None
    cancelled: bool = False
    ended: bool = False

    @property
    def prompt_logprobs(self) -> Sequence[TokenLogprobs]:
        """Of the prompt's tokens but the first, where they are asked for; complete with the first token."""
        return self.sequence.prompt_logprobs if self.sequence is not None else ()


class Observer(Protocol):
    """Is told what happens, as metrics are made of it."""

    def joined(self, ticket: Ticket) -> None:
        """Note that a sequence joined the batch."""
        ...

    def took(self, ticket: Ticket, tokens: int, now: float) -> None:
        """Note that a sequence got tokens; `ticket` still has the time of those before."""
        ...

    def ended(self, ticket: Ticket, ending: Ending, now: float) -> None:
        """Note that a sequence ended."""
        ...

    def stepped(self, seconds: float, running: int) -> None:
        """Note that a round of so many sequences is done."""
        ...


class QueueFullError(Exception):
    """So many sequences wait that no more are taken."""


@dataclass(slots=True)
class Scheduler:
    """First come, first served. Not thread-safe."""

    batch: Batch
    tokenizer: Tokenizer | None
    queue: int
    """Sequences that may wait, beside those that run."""
    observer: Observer | None = None
    clock: Callable[[], float] = time.monotonic
    waiting: deque[Ticket] = field(default_factory=deque[Ticket], init=False)
    running: dict[int, Ticket] = field(default_factory=dict[int, Ticket], init=False)
    """By the identity of their sequences."""
    admits: bool = field(default=True, init=False)
    """Whether sequences that wait may join."""

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.waiting and not self.running

    @property
    def places(self) -> int:
        """Sequences that it holds at most, waiting or running."""
        return self.queue + self.batch.engine.batch

    def ticket(self, work: Work, deliver: Deliver) -> Ticket:
        """Return the ticket of a sequence. N3CError (exit code 2) where the build cannot take its prompt."""
        self.batch.capacity.require([work.prompt], self.batch.engine.batch)
        return Ticket(work, deliver, self.clock())

    def submit(self, ticket: Ticket) -> None:
        """Let a sequence wait; QueueFullError where there is no place."""
        if len(self.waiting) + len(self.running) >= self.places:
            raise QueueFullError
        self.waiting.append(ticket)

    def cancel(self, ticket: Ticket) -> None:
        """End a sequence where it is: it gets no further round."""
        if not ticket.ended:
            ticket.cancelled = True

    def step(self) -> None:
        """Let sequences leave that were cancelled and others join, do a round, and deliver what it brought."""
        self.sweep()
        start = self.clock()
        try:
            while self.waiting and self.batch.free and self.admits:
                self._join(self.waiting.popleft())
            if not self.running:
                return
            taken = self.batch.round()
        except Exception as error:
            self._fail_all(error)
            return
        now = self.clock()
        news: dict[int, list[Token]] = {key: [] for key in self.running}
        for each in taken:
            news[id(each.sequence)].append(Token(each.token, each.text, each.logprobs))
        if self.observer is not None:
            self.observer.stepped(now - start, len(self.running))
        for key, tokens in news.items():
            self._tell(self.running[key], tokens, now)

    def end_all(self) -> None:
        """End all sequences where they are."""
        for ticket in (*self.waiting, *self.running.values()):
            self.cancel(ticket)
        self.sweep()

    def end_running(self) -> None:
        """End the sequences that run; those that wait stay."""
        for ticket in self.running.values():
            self.cancel(ticket)
        self.sweep()

    def sweep(self) -> None:
        """Let sequences leave that were cancelled."""
        for ticket in [each for each in self.waiting if each.cancelled]:
            self.waiting.remove(ticket)
            self._end(ticket, "interrupted")
        try:
            for ticket in [each for each in self.running.values() if each.cancelled]:
                assert ticket.sequence is not None
                self.batch.drop(ticket.sequence)
                self._end(ticket, "interrupted")
        except Exception as error:  # the engine keeps the states of those that leave
            self._fail_all(error)

    def _join(self, ticket: Ticket) -> None:
        """Let a sequence join the batch; one that cannot begin fails alone."""
        work = ticket.work
        ticket.started = self.clock()
        try:
            sequence = Running.begin(work.prompt, work.index, work.options, self.tokenizer)
        except Exception as error:
            self._end(ticket, "failed", failure=_failure(error))
            return
        ticket.sequence = sequence
        self.running[id(sequence)] = ticket
        self.batch.add(sequence)
        ticket.cached_tokens = sequence.read
        if self.observer is not None:
            self.observer.joined(ticket)

    def _tell(self, ticket: Ticket, tokens: list[Token], now: float) -> None:
        """Deliver what a round brought a sequence, and forget one that has ended."""
        sequence = ticket.sequence
        assert sequence is not None
        if tokens:
            if self.observer is not None:
                self.observer.took(ticket, len(tokens), now)
            ticket.first_token = now if ticket.first_token is None else ticket.first_token
            ticket.last_token = now
        if sequence.ending is not None:
            self._end(ticket, sequence.ending, tokens, sequence.failure)
        elif tokens:
            ticket.deliver(Update(tuple(tokens)))

    def _end(
        self, ticket: Ticket, ending: Ending, tokens: Sequence[Token] = (), failure: N3CError | None = None
    ) -> None:
        ticket.ended = True
        if ticket.sequence is not None:
            del self.running[id(ticket.sequence)]
        if self.observer is not None:
            self.observer.ended(ticket, ending, self.clock())
        ticket.deliver(Update(tuple(tokens), ending, failure))

    def _fail_all(self, error: Exception) -> None:
        """Let all that run fail by an error of the engine: its states are unknown; the next request finds it anew."""
        failure = _failure(error)
        self.batch.abandon(failure)
        for ticket in list(self.running.values()):
            self._end(ticket, "failed", failure=failure)


def _failure(error: Exception) -> N3CError:
    if isinstance(error, N3CError):
        return error
    message = f"internal error: {type(error).__name__}: {error}"
    return N3CError(Diagnostic("E0001", message), ExitCode.INTERNAL)
