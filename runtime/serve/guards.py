"""What a request passes before it is read: the key, and bounds on its size and time."""

from __future__ import annotations

import asyncio
import hmac

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError
from .limits import Limits

OPEN = frozenset(("/health",))
"""Paths that need no key."""


class Guard:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, api_key: str | None, limits: Limits) -> None:
        self._app, self._limits = app, limits
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request that may not pass, and pass on another with its body read."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._require_key(scope)
            body = await asyncio.wait_for(self._body(scope, receive), self._limits.body_seconds)
        except TimeoutError:
            await ApiError(408, "the body took too long", code="timeout").response()(scope, receive, send)
        except ApiError as error:
            await error.response()(scope, receive, send)
        else:
            if body is not None:
                await self._app(scope, _replay(body, receive), send)

    def _require_key(self, scope: Scope) -> None:
        if self._key is None or scope["path"] in OPEN:
            return
        given = next((value for name, value in scope["headers"] if name.lower() == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        if not hmac.compare_digest(key, self._key) or scheme.lower() != b"bearer":
            raise ApiError(401, "the API key is missing or wrong", param=None, code="invalid_api_key")

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """Return the body; None where its client goes away before it is whole."""
        most = self._limits.body_bytes
        length = next((value for name, value in scope["headers"] if name.lower() == b"content-length"), b"0")
        if length.isdigit() and int(length) > most:
            raise self._too_large()
        parts: list[bytes] = []
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            if sum(map(len, parts)) > most:
                raise self._too_large()
            if not message.get("more_body", False):
                return b"".join(parts)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body has more than {self._limits.body_bytes:,} bytes", code="body_too_large")


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body at once, and what comes after it when it comes."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
