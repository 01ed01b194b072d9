"""The HTTP interface of a served model."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from n3c.ir.diagnostics import N3CError

from .chat import chat_completions
from .completions import completions
from .errors import ApiError, draining, failed, from_n3c, internal
from .guards import Guard
from .openapi import openapi
from .served_model import ServedModel
from .weight_routes import weight_routes


def create_app(served: ServedModel, routes: Sequence[BaseRoute] = ()) -> Starlette:
    """Return the ASGI application of a model; `routes` are more of them."""

    async def health(_: Request) -> Response:
        if served.service.healthy:
            return JSONResponse({"status": "ok"})
        failure = served.service.failure
        return (draining() if failure is None else failed(failure)).response()

    async def metrics(_: Request) -> Response:
        return Response(served.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_model(served)]})

    async def model(request: Request) -> Response:
        served.require(request.path_params["model"])
        return JSONResponse(_model(served))

    async def description(_: Request) -> Response:
        return JSONResponse(openapi())

    return Starlette(
        routes=[
            Route("/health", health),
            Route("/metrics", metrics),
            Route("/openapi.json", description),
            Route("/v1/models", models),
            Route("/v1/models/{model:path}", model),
            Route("/v1/completions", _bound(completions, served), methods=["POST"]),
            Route("/v1/chat/completions", _bound(chat_completions, served), methods=["POST"]),
            *weight_routes(served),
            *routes,
        ],
        middleware=[Middleware(Guard, served.api_key, served.limits)],
        exception_handlers={
            ApiError: _api_error,
            N3CError: _n3c_error,
            HTTPException: _http_error,
            Exception: _internal_error,
        },
    )


def _bound(
    answer: Callable[[ServedModel, Request], Awaitable[Response]], served: ServedModel
) -> Callable[[Request], Awaitable[Response]]:
    async def bound(request: Request) -> Response:
        return await answer(served, request)

    return bound


def _model(served: ServedModel) -> dict[str, Any]:
    length = served.service.scheduler.batch.capacity.context_length
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "n3c",
        "max_model_len": length,
    }


def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


def _n3c_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, N3CError)
    return from_n3c(error).response()


def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = ApiError(error.status_code, error.detail, code=None).response()
    response.headers.update(error.headers or {})
    return response


def _internal_error(_: Request, error: Exception) -> Response:
    return internal().response()
