"""Plans that are built by processes of their own, several at once.

TensorRT's builder works on one core, keeps most of the memory that it took until its process ends, and writes a plan
with a loop in another way the second time; so every plan has a process, which ends with it.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import IO

from n3c.backends.machine import available_memory_bytes, rss_bytes, usable_cores
from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError

from .build import PlanResult
from .builder_process import Message, Order, Refused, Step, send

_HEARTBEAT = 0.2
"""Seconds between looks at what the processes are at."""
_LAST_WORDS = 4000
"""Bytes of what a process printed last that are looked at where it crashed."""
_PROGRAM = "import sys; sys.path[:] = {path!r}; from n3c.backends.trt.builder_process import main; main()"
"""The child finds modules where this process does, whatever has changed its path."""
_ALLOCATOR = {
    "tcache_count": 65535,
    "mxfast": 0,
    "trim_threshold": 2**32,
    "top_pad": 2**26,
    "mmap_threshold": 2**30,
}
"""glibc's malloc for a process that ends with its plan: it keeps what is freed. A third of the builder's time went to
merging small pieces and giving them back."""


class Builders:
    """Processes that build what is ordered, what takes most memory first; leaving the context ends them."""

    def __init__(self, jobs: int | None = None) -> None:
        """Have at most `jobs` at once; None: one for each core, as many as the free memory is expected to hold."""
        self._bounded = jobs is None
        self._pool = ThreadPoolExecutor(jobs or usable_cores(), thread_name_prefix="builder")
        self._lock = threading.Condition()
        """Notified when a process has ended."""
        self._waiting: list[Order] = []
        self._running: dict[subprocess.Popen[bytes], tuple[Order, Step]] = {}
        """Process → what it builds, and what it is at."""
        self._ended: queue.SimpleQueue[PlanResult | Exception] = queue.SimpleQueue()
        self._unread = 0
        self._closed = False

    def __enter__(self) -> Builders:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._closed = True
            for process in self._running:
                process.kill()
            self._lock.notify_all()
        self._pool.shutdown(cancel_futures=True)

    def order(self, order: Order) -> None:
        """Have a plan built, as soon as a process may."""
        with self._lock:
            self._waiting.append(order)
        self._unread += 1
        self._pool.submit(self._build_next)

    def results(self, waiting: Callable[[Mapping[str, Step]], None]) -> Iterator[PlanResult]:
        """Yield what was ordered, each as it is built; meanwhile tell `waiting` which plan is at what.

        N3CError for the first that cannot be built (E0504, E0505, E0613), or whose process dies (E0523).
        """
        while self._unread:
            try:
                result = self._ended.get(timeout=_HEARTBEAT)
            except queue.Empty:
                with self._lock:
                    steps = {order.plan.name: step for order, step in self._running.values()}
                waiting(steps)
                continue
            if isinstance(result, Exception):
                raise result
            self._unread -= 1
            yield result

    def _build_next(self) -> None:
        """Build one of the plans that wait, in a thread of the pool."""
        try:
            with tempfile.TemporaryFile() as printed:
                with self._lock:
                    order = self._next()
                    if order is None:
                        return
                    process = _started(printed)
                    self._running[process] = (order, Step("Starting"))
                try:
                    result = self._result(process, order, printed)
                finally:
                    with self._lock:
                        del self._running[process]
                        self._lock.notify_all()
            self._ended.put(result)
        except Exception as error:
            self._ended.put(error)

    def _next(self) -> Order | None:
        """Wait until memory is free for a plan that waits, and take the largest of those; None after the end."""
        while not self._closed:
            free = self._free_memory()
            fitting = [order for order in self._waiting if free is None or order.memory <= free]
            if fitting:
                largest = max(fitting, key=lambda order: order.memory)
                self._waiting.remove(largest)
                return largest
            self._lock.wait()
        return None

    def _free_memory(self) -> int | None:
        """Return the bytes that another process may take, None for any: the first one always begins.

        They are what is free now, less what those at work are expected to take beyond what they hold already.
        """
        free = available_memory_bytes() if self._bounded and self._running else None
        if free is None:
            return None
        return free - sum(
            max(0, order.memory - (rss_bytes(process.pid) or 0)) for process, (order, _) in self._running.items()
        )

    def _result(self, process: subprocess.Popen[bytes], order: Order, printed: IO[bytes]) -> PlanResult:
        """Return what a process makes of `order`; N3CError where it does not."""
        message: Message | None = None
        with process:
            assert process.stdin is not None and process.stdout is not None
            with suppress(EOFError, OSError, pickle.UnpicklingError):  # it has ended, perhaps within a message
                send(process.stdin, order)
                while isinstance(message := pickle.load(process.stdout), Step):
                    with self._lock:
                        self._running[process] = (order, message)
            with suppress(OSError):  # what it has not read is lost with it
                process.stdin.close()
        if isinstance(message, PlanResult):
            return message
        if isinstance(message, Refused):
            raise N3CError(message.diagnostics, message.exit_code)
        raise _died(order, process.returncode, printed)


def _started(printed: IO[bytes]) -> subprocess.Popen[bytes]:
    """Return a new process that waits for an order; what it prints goes to a file."""
    command = [sys.executable, "-P", "-c", _PROGRAM.format(path=sys.path)]
    tunables = ":".join(f"glibc.malloc.{name}={value}" for name, value in _ALLOCATOR.items())
    environment = {"GLIBC_TUNABLES": tunables, **os.environ}  # what the user has set stays
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=printed, env=environment)


def _died(order: Order, code: int, printed: IO[bytes]) -> N3CError:
    """Return the error (E0523, exit code 4) for a process that ended without a result."""
    if code < 0:
        how, help_ = f"was killed by {signal.Signals(-code).name}", None
    else:
        printed.seek(max(0, printed.seek(0, os.SEEK_END) - _LAST_WORDS))
        last = printed.read().decode(errors="replace").strip().rpartition("\n")[2]
        how, help_ = f"ended with code {code}" + (f": {last}" if last else ""), None
    if code == -9:
        help_ = "a system that is short of memory does so: build fewer at once (--jobs 1), or in more stages (--stages)"
    message = f"the process that builds {order.plan.name} {how}"
    place = next(iter(order.spans.values()), None)
    return N3CError(Diagnostic("E0523", message, place, help=help_), ExitCode.TARGET)
