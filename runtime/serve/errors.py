"""Errors in OpenAI's form, and the status of each."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

from n3c.ir.diagnostics import ExitCode, N3CError

INVALID = "invalid_request_error"


class ApiError(Exception):
    """What a client is told instead of an answer."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.param, self.code, self.retry_after = status, kind, param, code, retry_after

    def body(self) -> dict[str, Any]:
        """Return the JSON of an answer, or of an event that ends a stream."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Return the answer."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status in (408, 413):
            headers["Connection"] = "close"  # what remains of the body is not read
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


def overloaded() -> ApiError:
    """Return the answer where the queue is full."""
    message = "too many requests wait; try again later"
    return ApiError(429, message, kind="rate_limit_error", code="queue_full", retry_after=1)


def draining() -> ApiError:
    """Return the answer of a server that ends."""
    return ApiError(503, "the server is shutting down", kind="server_error", code="shutting_down", retry_after=5)


def failed(failure: N3CError) -> ApiError:
    """Return the answer of a server whose engine has ended."""
    return ApiError(503, str(failure.diagnostics[0].message), kind="server_error", code=failure.diagnostics[0].code)


def internal() -> ApiError:
    """Return the answer where the server is at fault."""
    return ApiError(500, "internal error", kind="server_error", code="internal_error")


_PARAMS = {"E0802": ("prompt", "context_length_exceeded"), "E0804": ("prompt", None), "E0840": ("messages", None)}
"""Code of a diagnostic → the parameter that is at fault, and OpenAI's code."""


def from_n3c(error: N3CError) -> ApiError:
    """Return what a client is told of an error of n3c: its own fault with status 400, else 500."""
    first = error.diagnostics[0]
    message = "; ".join(each.message for each in error.diagnostics)
    if error.exit_code != ExitCode.USAGE:
        return ApiError(500, message, kind="server_error", code=first.code)
    param, code = _PARAMS.get(first.code, ("response_format" if first.code == "E0841" else None, None))
    return ApiError(400, message, param=param, code=code or first.code)
