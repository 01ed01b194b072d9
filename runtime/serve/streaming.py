"""Server-sent events, and answers that end when their client goes away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from n3c.ir.diagnostics import N3CError

from .errors import ApiError, from_n3c, internal

PING_SECONDS = 15.0
"""After so long without an event a comment is sent, so that nothing between takes the connection for dead."""
CLIENT_CLOSED = 499
"""The status of an answer that nobody reads."""


class EventStream(Response):
    """A stream of chunks and `[DONE]`. One that breaks ends with an error instead; `close` is called at every end."""

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncGenerator[dict[str, Any]], close: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._chunks, self._close = chunks, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events, until the client goes away."""
        sending, gone = asyncio.ensure_future(self._send(send)), asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait([sending, gone], return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            await _end(sending, gone)
            self._close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for event in _events(self._chunks):
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _events(chunks: AsyncGenerator[dict[str, Any]]) -> AsyncIterator[bytes]:
    try:
        async for chunk in _with_pings(chunks):
            yield b": ping\n\n" if chunk is None else event(chunk)
    except ApiError as error:
        yield event(error.body())
    except N3CError as error:
        yield event(from_n3c(error).body())
    except Exception:
        yield event(internal().body())
        raise
    else:
        yield b"data: [DONE]\n\n"


def event(data: dict[str, Any]) -> bytes:
    """Return the event that carries `data`."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def _with_pings(chunks: AsyncGenerator[dict[str, Any]]) -> AsyncIterator[dict[str, Any] | None]:
    """Yield chunks, and None where none has come for a while."""
    next_chunk: asyncio.Task[dict[str, Any]] | None = None
    try:
        while True:
            if next_chunk is None:
                next_chunk = asyncio.ensure_future(_next(chunks))
            done, _ = await asyncio.wait([next_chunk], timeout=PING_SECONDS)
            if not done:
                yield None
                continue
            finished, next_chunk = next_chunk, None
            try:
                yield finished.result()
            except StopAsyncIteration:
                return
    finally:
        if next_chunk is not None:
            await _end(next_chunk)
        await chunks.aclose()


async def _next(chunks: AsyncGenerator[dict[str, Any]]) -> dict[str, Any]:
    return await anext(chunks)


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
