"""uvicorn around the application: it ends as asked, answering what it has taken."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Callable, Generator

import uvicorn

from .app import create_app
from .bounded_protocol import bounded_protocol
from .log import LOG
from .served_model import ServedModel

SWITCH_SECONDS = 5e-4
"""How long the engine's thread may keep Python to itself; with the usual 5 ms the event loop lags as much."""

LINGER_SECONDS = 5.0
"""How long after the grace time a client may still read its answer, and a trainer send its weights."""


class HttpServer:
    """Serves a model on a socket until `end` is called, SIGTERM or SIGINT comes to the main thread, or it fails."""

    def __init__(
        self, served: ServedModel, listening: socket.socket, *, grace: float, access_log: bool = False
    ) -> None:
        """Listen on a socket of `bound`; OSError where another process has begun to since."""
        self.served, self.grace = served, grace
        self.socket = listening
        self.socket.listen(2048)
        config = uvicorn.Config(
            create_app(served),
            http=bounded_protocol(served.limits),
            ws="none",
            access_log=access_log,
            log_config=LOG,
            log_level="warning" if not access_log else "info",
            lifespan="off",
            server_header=False,
            date_header=False,
        )
        self._server = _Server(config)
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def url(self) -> str:
        """The base of the interface, as clients want it."""
        host, port = self.socket.getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._server.server_state.connections)

    def run(self, ready: Callable[[], None] = lambda: None) -> None:
        """Serve, and close the model at the end. `ready` is called before the first request is taken.

        N3CError (E0845, exit code 1) where the engine's thread has ended by a fault, which requests are told first.
        """
        before = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_SECONDS)
        try:
            asyncio.run(self._serve(ready))
        finally:
            sys.setswitchinterval(before)
            self.served.close()
        if self.served.service.failure is not None:
            raise self.served.service.failure

    def end(self) -> None:
        """Take nothing new, give running requests the grace time, and return from `run`. From any thread."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended
                self._loop.call_soon_threadsafe(self._end)

    async def _serve(self, ready: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError, RuntimeError, NotImplementedError):  # not the main thread; Windows
                self._loop.add_signal_handler(number, self._end)
        self.served.service.when_ended(self.end)
        ready()
        await self._server.serve(sockets=[self.socket])

    def _end(self) -> None:
        """End; asked a second time, at once."""
        assert self._loop is not None
        grace = 0.0 if self.served.service.draining else self.grace
        self.served.service.drain()
        self._server.should_exit = True
        self._loop.call_later(grace, self.served.service.end_all)
        self._loop.call_later(grace + LINGER_SECONDS, self._force)

    def _force(self) -> None:
        self._server.force_exit = True


class _Server(uvicorn.Server):
    """Leaves signals to `HttpServer`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        yield


def bound(host: str, port: int) -> socket.socket:
    """Return a socket that has the address and does not listen yet; OSError where the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
    except (TypeError, ValueError) as error:  # no host has such a name
        listening.close()
        raise OSError(str(error)) from error
    except BaseException:
        listening.close()
        raise
    return listening
