"""HTTP/1.1 by h11 under uvicorn, with bounds on clients that are slow: uvicorn itself waits for them for ever.

The body of a request is bounded by `Guard`, an idle connection by uvicorn (5 seconds).
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus

from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import ApiError
from .limits import Limits


def bounded_protocol(limits: Limits) -> type[H11Protocol]:
    """Return the protocol of connections within `limits`."""

    class BoundedProtocol(H11Protocol):
        """One connection."""

        _head_timer: asyncio.TimerHandle | None = None
        """Runs while a head is to come, or what remains of a body that was answered without being read."""
        _unread_timer: asyncio.TimerHandle | None = None
        """Runs while the client reads less than the answer has."""
        _begun = False

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            self._begun = True
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            for timer in (self._head_timer, self._unread_timer):
                if timer is not None:
                    timer.cancel()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._unread_timer = self.loop.call_later(limits.unread_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._unread_timer is not None:
                self._unread_timer.cancel()

        def send_400_response(self, msg: str) -> None:
            self._refuse(ApiError(400, msg, code="invalid_http"))

        def _watch(self) -> None:
            """Let time run while a request is to come; a byte more does not begin it anew."""
            if self.cycle is not None and not self.cycle.response_complete:
                if self._head_timer is not None:
                    self._head_timer.cancel()
                    self._head_timer = None
            elif self._head_timer is None:
                self._head_timer = self.loop.call_later(limits.head_seconds, self._too_slow)

        def _too_slow(self) -> None:
            if self._begun:
                self._refuse(ApiError(408, "the request took too long", code="timeout"))
            else:
                self.transport.close()

        def _refuse(self, error: ApiError) -> None:
            """Answer a client that has sent no request, and close the connection."""
            if self.transport.is_closing():
                return
            response = error.response()
            head = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}".encode()]
            head += (b"%s: %s" % pair for pair in response.raw_headers)
            if error.status != 408:
                head.append(b"connection: close")
            self.transport.write(b"\r\n".join(head) + b"\r\n\r\n" + bytes(response.body))
            self.transport.close()

    return BoundedProtocol
