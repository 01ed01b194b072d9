"""An answer that is passed on from replicas, of which any may die: what is asked again, and what ends with an error."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from starlette.types import Send

from .errors import ApiError
from .streaming import event

Head = tuple[int, list[tuple[bytes, bytes]]]
"""Status and headers of an answer."""
Ask = Callable[[], AsyncIterator[Head | bytes]]
"""Gives a request to a replica: its answer's head comes first, then the pieces of the body."""
PAUSES = (0.0, 0.1, 0.5, 1.0, 2.0, 4.0)
"""Seconds before a request is given to the next replica; after the last one the client is told."""


class ReplicaLostError(Exception):
    """A replica that died before its answer was whole."""


async def relay(ask: Ask, send: Send, pauses: Sequence[float] = PAUSES) -> None:
    """Send an answer to a client by ASGI messages.

    An answer is sent when it is whole, an event stream from its first event with something of the model in it. Before
    that a request whose replica is lost is asked again; a stream that is lost later ends with an event of an error.
    """
    for pause in pauses:
        await asyncio.sleep(pause)
        answer = _Answer(send)
        try:
            async for piece in ask():
                await answer.feed(piece)
        except ReplicaLostError:
            if answer.begun:
                await answer.end(event(_lost().body()))
                return
        else:
            await answer.end()
            return
    nobody = _unavailable().response()
    answer = _Answer(send)
    await answer.feed((nobody.status_code, list(nobody.raw_headers)))
    await answer.end(bytes(nobody.body))


@dataclass(slots=True)
class _Answer:
    """What one replica says, held back until it may no longer be asked again."""

    send: Send
    begun: bool = False
    _head: Head | None = None
    _held: list[bytes] = field(default_factory=list[bytes])

    async def feed(self, piece: Head | bytes) -> None:
        """Take a piece, and send what need not be held back."""
        if isinstance(piece, tuple):
            self._head = piece
            return
        self._held.append(piece)
        if self.begun or (self._streams and says_something(piece)):
            await self._flush()

    async def end(self, last: bytes = b"") -> None:
        """Send what was held back, and end the answer."""
        self._held.append(last)
        await self._flush()
        await self.send({"type": "http.response.body", "body": b"", "more_body": False})

    @property
    def _streams(self) -> bool:
        headers = {} if self._head is None else {name.lower(): value for name, value in self._head[1]}
        return headers.get(b"content-type", b"").startswith(b"text/event-stream")

    async def _flush(self) -> None:
        if not self.begun:
            assert self._head is not None
            self.begun = True
            await self.send({"type": "http.response.start", "status": self._head[0], "headers": self._head[1]})
        for piece in self._held:
            if piece:
                await self.send({"type": "http.response.body", "body": piece, "more_body": True})
        self._held.clear()


def says_something(piece: bytes) -> bool:
    """Return whether an event of a stream has more than a role in it, or is an error; comments say nothing."""
    if not piece.startswith(b"data: {"):
        return not piece.startswith(b":")
    data: dict[str, Any] = json.loads(piece.removeprefix(b"data: "))
    deltas = [cast("dict[str, Any]", choice.get("delta")) for choice in data.get("choices", ())]
    return not deltas or any(delta != {"role": "assistant", "content": ""} for delta in deltas)


def _lost() -> ApiError:
    message = "the replica that answered has ended; send the request again"
    return ApiError(502, message, kind="server_error", code="replica_lost")


def _unavailable() -> ApiError:
    return ApiError(503, "no replica answers", kind="server_error", code="no_replica", retry_after=5)
