"""Server-sent events, and answers that end when their client goes away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from n3c.ir.diagnostics import N3CError

from .errors import ApiError, from_n3c, internal

PING_SECONDS = 15.0
"""So often a comment is sent where no event was, so that nothing between takes the connection for dead."""
CLIENT_CLOSED = 499
"""The status of an answer that nobody reads."""


class EventStream(Response):
    """A stream of chunks and `[DONE]`. One that breaks ends with an error instead; `close` is called at every end."""

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncGenerator[dict[str, Any]], close: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._chunks, self._close = chunks, close
        self._quiet = True
        """Whether no event was sent since the last look."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events, until the client goes away."""
        sending, gone = asyncio.ensure_future(self._send(send)), asyncio.ensure_future(_gone(receive))
        pinging = asyncio.ensure_future(self._ping(send))
        try:
            await asyncio.wait([sending, gone], return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            await _end(sending, gone, pinging)
            self._close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with aclosing(_events(self._chunks)) as events:
            async for event in events:
                self._quiet = False
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _ping(self, send: Send) -> None:
        """Send a comment where nothing has been sent for a while; a task of its own costs events nothing."""
        while True:
            self._quiet = True
            await asyncio.sleep(PING_SECONDS)
            if self._quiet:
                await send({"type": "http.response.body", "body": b": ping\n\n", "more_body": True})


async def _events(chunks: AsyncGenerator[dict[str, Any]]) -> AsyncGenerator[bytes]:
    try:
        async for chunk in chunks:
            yield event(chunk)
    except ApiError as error:
        yield event(error.body())
    except N3CError as error:
        yield event(from_n3c(error).body())
    except Exception:
        yield event(internal().body())
        raise
    else:
        yield b"data: [DONE]\n\n"
    finally:
        await chunks.aclose()


def event(data: dict[str, Any]) -> bytes:
    """Return the event that carries `data`."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def unless_gone(request: Request, answer: Coroutine[Any, Any, Response]) -> Response:
    """Return an answer; where its client goes away first it is cancelled."""
    answering, gone = asyncio.ensure_future(answer), asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait([answering, gone], return_when=asyncio.FIRST_COMPLETED)
        return answering.result() if answering.done() else Response(status_code=CLIENT_CLOSED)
    finally:
        await _end(answering, gone)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
