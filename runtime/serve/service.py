"""A scheduler on a thread of its own: requests of any thread go in, what rounds bring comes out."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

from .scheduler import Deliver, QueueFullError, Scheduler, Ticket, Update, Work

T = TypeVar("T")


class DrainingError(Exception):
    """The service ends, and takes nothing new."""


class Service:
    """Runs a scheduler. Every method may be called from any thread but `deliver`'s."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.draining = False
        self._lock = threading.Lock()
        self._alive = 0
        """Sequences that were submitted and have not ended."""
        self._commands: deque[Callable[[], None]] = deque()
        """What the thread does before its next round."""
        self._wake = threading.Event()
        self._paused = False
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="n3c-engine", daemon=True)

    def start(self) -> Service:
        """Start the thread, and return the service."""
        self._thread.start()
        return self

    @property
    def healthy(self) -> bool:
        """Whether requests would be answered."""
        return self._thread.is_alive() and not self.draining

    @property
    def paused(self) -> bool:
        """Whether no round is done."""
        return self._paused

    @property
    def waiting(self) -> int:
        """Sequences that were submitted and do not run yet."""
        return max(0, self._alive - len(self.scheduler.running))

    def submit(self, works: Sequence[Work], deliver: Callable[[int, Update], None]) -> list[Ticket]:
        """Submit sequences, all or none; `deliver` gets their index in `works` and what each round brought.

        N3CError (exit code 2) where the build cannot take a prompt; QueueFullError; DrainingError.
        """
        tickets = [self.scheduler.ticket(work, self._counted(index, deliver)) for index, work in enumerate(works)]
        with self._lock:
            if self.draining or self._stopped:
                raise DrainingError
            if self._alive + len(tickets) > self.scheduler.places:
                raise QueueFullError
            self._alive += len(tickets)
        self._command(lambda: self._submit(tickets))
        return tickets

    def cancel(self, tickets: Sequence[Ticket]) -> None:
        """End sequences where they are, before the next round."""

        def cancel() -> None:
            for ticket in tickets:
                self.scheduler.cancel(ticket)

        if not all(ticket.ended for ticket in tickets):
            self._command(cancel)

    def pause(self, *, finish: bool = False) -> None:
        """Let no sequence join, and no round be done; with `finish` those that run end first. Returns when it is so."""
        done = threading.Event()

        def pause() -> None:
            self.scheduler.admits = False
            if finish and self.scheduler.running:
                self._commands.append(pause)  # looks again after the next round
                self._wake.set()
            else:
                self._paused = True
                done.set()

        self._command(pause)
        done.wait()

    def resume(self) -> None:
        """Go on where `pause` stopped."""

        def resume() -> None:
            self.scheduler.admits, self._paused = True, False

        self._command(resume)

    def call(self, function: Callable[[], T]) -> T:
        """Run `function` on the thread between two rounds, paused or not, and return what it returns or raise."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self._command(run)
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
        with self._lock:
            self.draining = True

        def stop() -> None:
            self.scheduler.end_all()
            self._stopped = True

        self._command(stop)
        self._thread.join()

    def _counted(self, index: int, deliver: Callable[[int, Update], None]) -> Deliver:
        def counted(update: Update) -> None:
            if update.ending is not None:
                with self._lock:
                    self._alive -= 1
            deliver(index, update)

        return counted

    def _submit(self, tickets: Sequence[Ticket]) -> None:
        for ticket in tickets:
            self.scheduler.submit(ticket)

    def _command(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        self._wake.set()

    def _run(self) -> None:
        try:
            while not self._stopped:
                self._wake.wait()
                self._wake.clear()
                for _ in range(len(self._commands)):
                    self._commands.popleft()()
                if self._paused:
                    self.scheduler.sweep()
                elif not self.scheduler.idle:
                    self.scheduler.step()
                if not self._paused and not self.scheduler.idle:
                    self._wake.set()
        finally:  # whatever happens, nobody waits for ever
            self._stopped = True
            self.scheduler.end_all()
