"""A scheduler on a thread of its own: requests of any thread go in, what rounds bring comes out.

Whoever waits for the thread is told where it ends, of itself or by a fault: nobody waits for ever.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError

from .scheduler import QueueFullError, Scheduler, Ticket, Update, Work

T = TypeVar("T")

STOP_SECONDS = 30.0
"""How long `stop` waits for a round to end; a call of an engine that hangs must not keep the process from ending."""


class DrainingError(Exception):
    """The service ends, and takes nothing new."""


@dataclass(frozen=True, slots=True)
class _Command:
    """What the thread does before its next round, and what is done instead where it has ended."""

    run: Callable[[], None]
    give_up: Callable[[Exception], None]


class Service:
    """Runs a scheduler. Every method may be called from any thread but `deliver`'s."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.draining = False
        self.failure: N3CError | None = None
        """Why the thread has ended (E0845, exit code 1), where it was by a fault."""
        self._lock = threading.Lock()
        self._open: set[Ticket] = set()
        """Sequences that were submitted and have not ended."""
        self._commands: deque[_Command] = deque()
        self._watchers: list[Callable[[], None]] = []
        self._wake = threading.Event()
        self._paused = False
        self._resumed = 0
        """How many times."""
        self._stopped = False
        self._ended = False
        """Whether the thread takes no command any more."""
        self._thread = threading.Thread(target=self._run, name="n3c-engine", daemon=True)

    def start(self) -> Service:
        """Start the thread, and return the service."""
        self._thread.start()
        return self

    @property
    def healthy(self) -> bool:
        """Whether requests would be answered."""
        return self._thread.is_alive() and not self._ended and not self.draining

    @property
    def paused(self) -> bool:
        """Whether no round is done."""
        return self._paused

    @property
    def waiting(self) -> int:
        """Sequences that were submitted and do not run yet."""
        return max(0, len(self._open) - len(self.scheduler.running))

    def require_places(self, count: int) -> None:
        """Raise what `submit` would raise for so many sequences now."""
        with self._lock:
            self._require_places(count)

    def submit(self, works: Sequence[Work], deliver: Callable[[int, Update], None]) -> list[Ticket]:
        """Submit sequences, all or none; `deliver` gets their index in `works` and what each round brought.

        N3CError (exit code 2) where the build cannot take a prompt, E0845 where the thread has ended by a fault;
        QueueFullError; DrainingError.
        """
        tickets: list[Ticket] = []

        def delivered(index: int, update: Update) -> None:
            if update.ending is not None:
                with self._lock:
                    self._open.discard(tickets[index])
            deliver(index, update)

        tickets += [self.scheduler.ticket(work, partial(delivered, index)) for index, work in enumerate(works)]
        with self._lock:
            self._require_places(len(tickets))
            self._open.update(tickets)
        self._command(lambda: self._submit(tickets))
        return tickets

    def cancel(self, tickets: Sequence[Ticket]) -> None:
        """End sequences where they are, before the next round."""

        def cancel() -> None:
            for ticket in tickets:
                self.scheduler.cancel(ticket)

        if not all(ticket.ended for ticket in tickets):
            self._command(cancel)

    def pause(self, *, finish: bool = False) -> bool:
        """Let no sequence join, and no round be done; with `finish` those that run end first. Returns when it is so.

        False: it was resumed before they had ended. DrainingError, or N3CError (E0845), where the thread ends first.
        """
        done: Future[bool] = Future()
        resumed: int | None = None

        def pause() -> None:
            nonlocal resumed
            resumed = self._resumed if resumed is None else resumed
            if resumed != self._resumed:
                done.set_result(False)
                return
            self.scheduler.admits = False
            self._paused = not (finish and self.scheduler.running)
            if self._paused:
                done.set_result(True)
            else:
                self._command(pause, done.set_exception)  # looks again after the next round

        self._command(pause, done.set_exception)
        return done.result()

    def resume(self) -> None:
        """Go on where `pause` stopped."""

        def resume() -> None:
            self._resumed += 1
            self.scheduler.admits, self._paused = True, False

        self._command(resume)

    def call(self, function: Callable[[], T]) -> T:
        """Run `function` on the thread between two rounds, paused or not, and return what it returns or raise.

        DrainingError, or N3CError (E0845), where the thread ends before.
        """
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self._command(run, future.set_exception)
        return future.result()

    def drain(self) -> None:
        """Take nothing new; what was submitted goes on."""
        with self._lock:
            self.draining = True

    def end_all(self) -> None:
        """End all sequences where they are."""
        self._command(self.scheduler.end_all)

    def stop(self) -> None:
        """End all sequences and the thread."""
        self.drain()

        def stop() -> None:
            self._stopped = True
            self.scheduler.end_all()

        self._command(stop)
        if self._thread.is_alive():
            self._thread.join(STOP_SECONDS)

    def when_ended(self, tell: Callable[[], None]) -> None:
        """Let `tell` be called when the thread has ended: by the thread, or at once where it has."""
        with self._lock:
            if not self._ended:
                self._watchers.append(tell)
                return
        tell()

    def _require_places(self, count: int) -> None:
        if self._ended or self.draining:
            raise self._reason()
        if len(self._open) + count > self.scheduler.places:
            raise QueueFullError

    def _submit(self, tickets: Sequence[Ticket]) -> None:
        for ticket in tickets:
            self.scheduler.submit(ticket)

    def _command(self, run: Callable[[], None], give_up: Callable[[Exception], None] = lambda _: None) -> None:
        with self._lock:
            if not self._ended:
                self._commands.append(_Command(run, give_up))
                self._wake.set()
                return
        give_up(self._reason())

    def _run(self) -> None:
        try:
            while not self._stopped:
                self._turn()
        except BaseException as error:
            self.failure = _died(error)
        finally:
            self._end()

    def _turn(self) -> None:
        """Do what was asked for, and a round."""
        self._wake.wait()
        self._wake.clear()
        for _ in range(len(self._commands)):
            self._commands.popleft().run()
        if self._paused:
            self.scheduler.sweep()
        elif not self.scheduler.idle:
            self.scheduler.step()
        if not self._paused and not self.scheduler.idle:
            self._wake.set()

    def _end(self) -> None:
        """Tell everyone who waits for the thread, and those who ask later."""
        with self._lock:
            self._ended = True
            commands, tickets, watchers = list(self._commands), list(self._open), list(self._watchers)
            self._commands.clear()
        last = Update((), "interrupted" if self.failure is None else "failed", self.failure)
        for ticket in tickets:
            ticket.ended = True
            with contextlib.suppress(Exception):  # the others are told whatever one does
                ticket.deliver(last)
        for command in commands:
            command.give_up(self._reason())
        for tell in watchers:
            tell()

    def _reason(self) -> Exception:
        """Return what is raised where the thread has ended, or is about to."""
        return self.failure if self.failure is not None else DrainingError()


def _died(error: BaseException) -> N3CError:
    message = f"the thread that runs the engine has ended: {type(error).__name__}: {error}"
    failure = N3CError(Diagnostic("E0845", message, help="start the server again"), ExitCode.INTERNAL)
    failure.__cause__ = error
    return failure
