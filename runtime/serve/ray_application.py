"""`n3c serve` as an application of Ray Serve: replicas of the server, behind an entry that picks one for each request.

    serve.run(application(build="build/tiny", weights="weights", replicas=2))

The entry sends requests of one beginning to one replica, whose cache then has it; where that is full, to the next by
rank. What becomes of requests whose replica dies stands in `relay`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from n3c.runtime.options import size_of, usage_error

from .guards import Guard
from .limits import Limits
from .prefix_affinity import beginning, ranked
from .relay import Head, ReplicaLostError, relay

PASSED = (b"authorization", b"content-type", b"accept")
"""Headers that a replica gets."""


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


async def _forward(scope: Any, receive: Any, send: Any) -> None:
    """Answer a request, whose body comes in one piece, by a replica."""
    if scope["type"] != "http":
        return
    body = (await receive())["body"]
    passed = {key: scope[key] for key in ("http_version", "method", "scheme", "path", "raw_path", "query_string")}
    passed |= {"root_path": "", "headers": [pair for pair in scope["headers"] if pair[0].lower() in PASSED]}
    passed["headers"].append((b"content-length", str(len(body)).encode()))
    affinity = beginning(body)

    async def ask() -> AsyncIterator[Head | bytes]:
        answer = _replicas().answer.remote(passed, body, affinity=affinity)
        try:
            async for piece in answer:
                yield piece
        except RayActorError as error:  # it has died, or cannot be reached
            raise ReplicaLostError from error

    await relay(ask, send)


def _replicas() -> Any:
    """Return the handle of the replicas of this application."""
    handle = serve.get_deployment_handle("Replica", serve.get_replica_context().app_name)
    return handle.options(stream=True)


class Entry:
    """Takes HTTP requests."""

    def __init__(self, replicas: Any) -> None:
        """`replicas` are those that `_forward` gives requests to: they are started with this."""


def application(
    *, replicas: int = 1, concurrency: int = 64, actor_options: dict[str, Any] | None = None, **options: Any
) -> Any:
    """Return the application for `ray.serve.run`.

    `options` are those of `n3c serve`, with `build` and `weights`; `concurrency` are the requests that a replica has at
    once; `actor_options` are Ray's, as `{"num_gpus": 1}`. N3CError (E0701, exit code 2) for weight updates, which would
    reach one replica of several.
    """
    if options.get("allow_weight_updates"):
        raise usage_error("allow_weight_updates: an update would reach one replica only")
    most = options.get("max_body")
    limits = Limits() if most is None else Limits(body_bytes=size_of("max_body", most))
    deployed = Replica.options(  # type: ignore[attr-defined]
        num_replicas=replicas, max_ongoing_requests=concurrency, ray_actor_options=actor_options or {}
    )
    entry = serve.deployment(max_ongoing_requests=10_000)(serve.ingress(Guard(_forward, None, limits))(Entry))
    return entry.bind(deployed.bind(options))


__all__: Sequence[str] = ("PrefixRouter", "application")
