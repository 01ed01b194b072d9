"""`n3c serve` as an application of Ray Serve: replicas of the server, behind an entry that picks one for each request.

    serve.run(application(build="build/tiny", weights="weights", replicas=2))

The entry sends requests of one beginning to one replica, whose cache then has it; where that is full, to the next by
rank. A request whose replica dies before it has answered anything goes to another one.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from .prefix_affinity import beginning, ranked

ATTEMPTS = 5
"""Replicas that a request is given to, one after the other, as each dies."""
PASSED = (b"authorization", b"content-type", b"accept")
"""Headers that a replica gets."""

Head = tuple[int, list[tuple[bytes, bytes]]]
"""Status and headers of an answer."""


class PrefixRouter(RequestRouter):  # type: ignore[misc]
    """Ranks replicas by the beginning of a request's prompt."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return the replicas, each a rank of its own."""
        known = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        text = "" if pending_request is None else str(pending_request.kwargs.get("affinity", ""))
        return [[known[name]] for name in ranked(text, list(known))]


@serve.deployment(
    health_check_period_s=1,
    health_check_timeout_s=10,
    request_router_config=RequestRouterConfig(request_router_class=f"{__name__}:PrefixRouter"),
)
class Replica:
    """One server, without a port of its own."""

    def __init__(self, options: dict[str, Any]) -> None:
        from .app import create_app
        from .open import open_served

        self._served = open_served(**options)
        self._app = create_app(self._served)

    def check_health(self) -> None:
        """Raise where the engine's thread has ended."""
        if not self._served.service.healthy:
            raise RuntimeError("the service has ended")

    async def answer(self, scope: dict[str, Any], body: bytes, affinity: str) -> AsyncIterator[Head | bytes]:
        """Yield status and headers, and then the pieces of the body of an answer to an HTTP request."""
        import asyncio

        pieces: asyncio.Queue[Head | bytes | None] = asyncio.Queue()
        gone = asyncio.Event()
        given = False

        async def receive() -> dict[str, Any]:
            nonlocal given
            if given:
                await gone.wait()
                return {"type": "http.disconnect"}
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                await pieces.put((message["status"], list(message.get("headers", ()))))
            elif message["type"] == "http.response.body" and message.get("body"):
                await pieces.put(bytes(message["body"]))

        async def run() -> None:
            try:
                await self._app({"type": "http", "asgi": {"version": "3.0"}, **scope}, receive, send)
            finally:
                await pieces.put(None)

        task = asyncio.create_task(run())
        try:
            while (piece := await pieces.get()) is not None:
                yield piece
        finally:
            gone.set()  # a client that went away ends its request
            await task


class _Forward:
    """The ASGI application of the entry: gives requests to replicas."""

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
        passed = {key: scope[key] for key in ("http_version", "method", "scheme", "path", "raw_path", "query_string")}
        passed |= {"root_path": "", "headers": [pair for pair in scope["headers"] if pair[0].lower() in PASSED]}
        passed["headers"].append((b"content-length", str(len(body)).encode()))
        started = False
        for attempt in range(ATTEMPTS):
            try:
                async for piece in _replicas().answer.remote(passed, body, affinity=beginning(body)):
                    if isinstance(piece, bytes):
                        await send({"type": "http.response.body", "body": piece, "more_body": True})
                    else:
                        started = True
                        await send({"type": "http.response.start", "status": piece[0], "headers": piece[1]})
            except RayError:
                if started or attempt == ATTEMPTS - 1:
                    raise
            else:
                await send({"type": "http.response.body", "body": b"", "more_body": False})
                return


def _replicas() -> Any:
    """Return the handle of the replicas of this application."""
    handle = serve.get_deployment_handle("Replica", serve.get_replica_context().app_name)
    return handle.options(stream=True)


@serve.deployment(num_replicas=1, max_ongoing_requests=10_000)
@serve.ingress(_Forward())
class Entry:
    """Takes HTTP requests."""

    def __init__(self, replicas: Any) -> None:
        """`replicas` are those that `_Forward` gives requests to: they are started with this."""


def application(
    *, replicas: int = 1, concurrency: int = 64, actor_options: dict[str, Any] | None = None, **options: Any
) -> Any:
    """Return the application for `ray.serve.run`.

    `options` are those of `n3c serve`, with `build` and `weights`; `concurrency` are the requests that a replica has at
    once; `actor_options` are Ray's, as `{"num_gpus": 1}`.
    """
    deployed = Replica.options(  # type: ignore[attr-defined]
        num_replicas=replicas, max_ongoing_requests=concurrency, ray_actor_options=actor_options or {}
    )
    return Entry.bind(deployed.bind(options))  # type: ignore[attr-defined]


__all__: Sequence[str] = ("PrefixRouter", "application")
