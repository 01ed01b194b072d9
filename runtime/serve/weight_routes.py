"""Weights over HTTP: vLLM's routes for reinforcement learning, where a server allows them."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, cast

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from n3c.ir.diagnostics import ExitCode, N3CError

from .errors import ApiError
from .exchange import refusals
from .served_model import ServedModel

MODES = ("abort", "wait", "keep")
"""What becomes of requests in flight: they end where they are, they finish first, they go on afterwards."""


def weight_routes(served: ServedModel) -> list[Route]:
    """Return the routes, none where weights may not be replaced."""
    updates, service = served.weight_updates, served.service
    if updates is None:
        return []
    batch = service.scheduler.batch

    def pause(request: Request) -> dict[str, Any]:
        mode = request.query_params.get("mode", "abort")
        if mode not in MODES:
            raise ApiError(400, f"`mode` is one of {', '.join(MODES)}", param="mode")
        if not service.pause(finish=mode == "wait"):
            raise ApiError(409, "it was resumed before all requests had finished", code="resumed")
        if mode == "abort":
            service.call(service.scheduler.end_running)
        return {"status": "paused"}

    def resume() -> dict[str, Any]:
        service.resume()
        return {"status": "resumed"}

    def finish() -> dict[str, Any]:
        checkpoint = updates.finish_weight_update()
        service.call(lambda: batch.replace_weights(checkpoint))
        return {"message": "weights are updated", "updates": updates.updates}

    async def paused(request: Request) -> Response:
        return await _answer(lambda: pause(request))

    async def resumed(_: Request) -> Response:
        return await _answer(resume)

    async def is_paused(_: Request) -> Response:
        return JSONResponse({"is_paused": service.paused})

    async def initialise(request: Request) -> Response:
        info = await _table(request, "init_info")
        return await _answer(lambda: updates.init_weight_transfer_engine(info))

    async def start(_: Request) -> Response:
        return await _answer(updates.start_weight_update)

    async def update(request: Request) -> Response:
        info = await _table(request, "update_info")
        return await _answer(lambda: updates.update_weights(info))

    async def finished(_: Request) -> Response:
        return await _answer(finish)

    return [
        Route("/pause", paused, methods=["POST"]),
        Route("/resume", resumed, methods=["POST"]),
        Route("/is_paused", is_paused),
        Route("/init_weight_transfer_engine", initialise, methods=["POST"]),
        Route("/start_weight_update", start, methods=["POST"]),
        Route("/update_weights", update, methods=["POST"]),
        Route("/finish_weight_update", finished, methods=["POST"]),
    ]


async def _answer(act: Callable[[], dict[str, Any] | None]) -> Response:
    """Answer with what `act` returns, which may take its time; what is wrong with tensors is the client's fault."""
    try:
        with refusals():
            return JSONResponse(await _on_thread(act) or {"message": "done"})
    except N3CError as error:
        if error.exit_code not in (ExitCode.USAGE, ExitCode.FILE):
            raise
        first = error.diagnostics[0]
        raise ApiError(400, "; ".join(each.message for each in error.diagnostics), code=first.code) from error


async def _on_thread(act: Callable[[], dict[str, Any] | None]) -> dict[str, Any] | None:
    """Return what `act` returns on a thread that the end of the program does not wait for: a trainer may never come."""
    future: Future[dict[str, Any] | None] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(act())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="n3c-weights", daemon=True).start()
    return await asyncio.wrap_future(future)


async def _table(request: Request, key: str) -> dict[str, Any]:
    try:
        body = json.loads(await request.body())
    except ValueError as error:
        raise ApiError(400, "the body is not JSON", code="invalid_json") from error
    table = cast("dict[str, Any]", body).get(key) if isinstance(body, dict) else None
    if not isinstance(table, dict):
        raise ApiError(400, f"`{key}` is to be an object", param=key)
    return cast("dict[str, Any]", table)
