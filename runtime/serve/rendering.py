"""Chat templates rendered in a process of their own, with a limit on time and memory."""

from __future__ import annotations

import multiprocessing
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError
from n3c.runtime.generation.chat_template import ChatTemplate, Message

if sys.platform == "win32":
    from multiprocessing.connection import PipeConnection as Connection
else:
    from multiprocessing.connection import Connection


class Renderer:
    """Renders one template. A process that takes too long, or dies, is replaced."""

    def __init__(self, template: ChatTemplate, seconds: float, memory: int) -> None:
        self.template, self._seconds, self._memory = template, seconds, memory
        self.literals = template.literals
        """What the template itself writes."""
        self._lock = threading.Lock()
        self._process: Any = None
        self._pipe: Connection | None = None

    def render(self, messages: Sequence[Message], variables: Mapping[str, object]) -> str:
        """Return the prompt, after at most the time that is allowed. N3CError (E0840, exit code 2)."""
        with self._lock:
            pipe = self._ready()
            try:
                pipe.send((messages, variables))
                if not pipe.poll(self._seconds):
                    raise TimeoutError
                text, fault = pipe.recv()
            except (OSError, EOFError) as error:
                self._end()
                slow = isinstance(error, TimeoutError)
                reason = f"it takes longer than {self._seconds:g} seconds" if slow else "its process died"
                raise _failed(f"the chat template fails: {reason}") from error
        if fault is not None:
            raise _failed(fault)
        return str(text)

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._end()

    def _ready(self) -> Connection:
        if self._pipe is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, other = context.Pipe()
            self._process = context.Process(target=_serve, args=(other, self.template, self._memory), daemon=True)
            self._process.start()
            other.close()
            self._pipe.recv()  # it has started, which is not the time of a template
        return self._pipe

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
        if self._pipe is not None:
            self._pipe.close()
        self._process = self._pipe = None


def _serve(pipe: Connection, template: ChatTemplate, memory: int) -> None:
    """Render what comes, until nobody asks any more."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which ends this process
    if sys.platform != "win32":
        import resource

        with suppress(ValueError, OSError):  # macOS refuses some limits; the one on time still holds
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    pipe.send(None)
    while True:
        try:
            messages, variables = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((template.render(messages, variables), None))
        except N3CError as error:
            pipe.send((None, error.diagnostics[0].message))


def _failed(message: str) -> N3CError:
    return N3CError(Diagnostic("E0840", message), ExitCode.USAGE)
