"""Chat templates rendered in a process of their own, with a limit on time and memory.

A plain program, not one of `multiprocessing`, which would run the main module of whoever uses n3c a second time.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress

from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError
from n3c.runtime.generation.chat_template import ChatTemplate, Message

START_SECONDS = 60.0
"""In which the process must have started; that is not the time of a template."""
_PROGRAM = "import json, sys; sys.path[:] = json.loads(input()); from n3c.runtime.serve.rendering import serve; serve()"


class Renderer:
    """Renders one template. A process that takes too long, or dies, is replaced."""

    def __init__(self, template: ChatTemplate, seconds: float, memory: int) -> None:
        self.template, self._seconds, self._memory = template, seconds, memory
        self.literals = template.literals
        """What the template itself writes."""
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def render(self, messages: Sequence[Message], variables: Mapping[str, object]) -> str:
        """Return the prompt, after at most the time that is allowed.

        N3CError (E0840): exit code 2 where the template fails, 1 where its process does not start.
        """
        with self._lock:
            process = self._ready()
            try:
                text, fault = _answer(process, self._seconds, (messages, variables))
            except (OSError, ValueError) as error:
                self._end()
                reason = str(error) if isinstance(error, TimeoutError) else "its process died"
                raise _failed(f"the chat template fails: {reason}") from error
        if fault is not None:
            raise _failed(fault)
        return str(text)

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._end()

    def _ready(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._process = subprocess.Popen(
                (sys.executable, "-c", _PROGRAM),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # a traceback could show what somebody has written
                encoding="utf-8",
            )
            described = (self.template.text, dict(self.template.tokens), self._memory)
            try:
                _answer(self._process, START_SECONDS, sys.path, described)
            except (OSError, ValueError) as error:
                self._end()
                message = f"the process that renders chats does not start: {error}"
                raise N3CError(Diagnostic("E0840", message), ExitCode.INTERNAL) from error
        return self._process

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            with suppress(OSError):  # what was not written to it yet
                self._process.communicate()
        self._process = None


def _answer(process: subprocess.Popen[str], seconds: float, *lines: object) -> tuple[object, str | None]:
    """Return what a process answers to lines of JSON; TimeoutError where it takes longer, OSError where it has died."""
    assert process.stdin is not None and process.stdout is not None
    late = threading.Event()

    def kill() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(seconds, kill)
    timer.start()
    try:
        for line in lines:
            process.stdin.write(json.dumps(line) + "\n")
        process.stdin.flush()
        text, fault = json.loads(process.stdout.readline())
    except (OSError, ValueError) as error:
        if late.is_set():
            raise TimeoutError(f"it takes longer than {seconds:g} seconds") from error
        raise
    finally:
        timer.cancel()
        timer.join()  # no thread of a request outlives it
    return text, fault


def serve() -> None:
    """Render what comes, until nobody asks any more: the program of the process."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which ends this process
    text, tokens, memory = json.loads(input())
    template = ChatTemplate(text, tokens)
    if sys.platform != "win32":
        import resource

        with suppress(ValueError, OSError):  # macOS refuses some limits; the one on time still holds
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    print("[null, null]", flush=True)
    for line in sys.stdin:
        messages, variables = json.loads(line)
        answer: tuple[str | None, str | None]
        try:
            answer = (template.render(messages, variables), None)
        except N3CError as error:
            answer = (None, error.diagnostics[0].message)
        print(json.dumps(answer), flush=True)


def _failed(message: str) -> N3CError:
    return N3CError(Diagnostic("E0840", message), ExitCode.USAGE)
