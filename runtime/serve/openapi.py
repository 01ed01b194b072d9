"""The server's own description, for clients and testers that read OpenAPI."""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from .requests import ChatRequest, CompletionRequest

_REF = "#/components/schemas/{model}"
_ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_MODEL: dict[str, Any] = {
    "type": "object",
    "required": ["id", "object", "created", "owned_by"],
    "properties": {
        "id": {"type": "string"},
        "object": {"const": "model"},
        "created": {"type": "integer"},
        "owned_by": {"type": "string"},
        "max_model_len": {"type": "integer"},
    },
}
_MODELS: dict[str, Any] = {
    "type": "object",
    "required": ["object", "data"],
    "properties": {"object": {"const": "list"}, "data": {"type": "array", "items": _MODEL}},
}
_ANSWER: dict[str, Any] = {
    "type": "object",
    "required": ["id", "object", "created", "model", "choices", "usage"],
    "properties": {
        "id": {"type": "string"},
        "object": {"enum": ["text_completion", "chat.completion"]},
        "created": {"type": "integer"},
        "model": {"type": "string"},
        "choices": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["index", "finish_reason", "logprobs"],
                "properties": {
                    "index": {"type": "integer"},
                    "finish_reason": {"enum": ["stop", "length", "tool_calls"]},
                },
            },
        },
        "usage": {
            "type": "object",
            "required": ["prompt_tokens", "completion_tokens", "total_tokens"],
        },
    },
}
_REFUSALS = {
    "400": "The request is not understood, or exceeds a limit.",
    "401": "The key is missing or wrong.",
    "404": "There is no such model.",
    "405": "Another method.",
    "408": "The body took too long.",
    "413": "The body is too large.",
    "429": "The queue is full; Retry-After says when to try again.",
    "500": "A fault of the server.",
    "503": "The server is shutting down.",
}


@cache
def openapi() -> dict[str, Any]:
    """Return the OpenAPI 3.1 document."""
    models: list[type[BaseModel]] = [CompletionRequest, ChatRequest]
    _, definitions = models_json_schema([(model, "validation") for model in models], ref_template=_REF)
    schemas = {**definitions["$defs"], "Error": _ERROR}
    name = {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "n3c serve", "version": "1"},
        "paths": {
            "/health": {"get": _operation("Whether requests are answered.", {"type": "object"})},
            "/metrics": {"get": _operation("Figures for Prometheus.", None)},
            "/v1/models": {"get": _operation("The model.", _MODELS)},
            "/v1/models/{model}": {"get": {**_operation("A model.", _MODEL), "parameters": [name]}},
            "/v1/completions": {"post": _operation("Continue texts.", _ANSWER, "CompletionRequest")},
            "/v1/chat/completions": {"post": _operation("Answer a chat.", _ANSWER, "ChatRequest")},
        },
        "components": {"schemas": schemas, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }


def _operation(summary: str, answer: dict[str, Any] | None, request: str | None = None) -> dict[str, Any]:
    content: dict[str, Any] = {"text/plain": {}} if answer is None else {"application/json": {"schema": answer}}
    if request is not None:
        content["text/event-stream"] = {}
    error = {"application/json": {"schema": {"$ref": _REF.format(model="Error")}}}
    responses: dict[str, Any] = {"200": {"description": "The answer.", "content": content}}
    responses |= {status: {"description": text, "content": error} for status, text in _REFUSALS.items()}
    operation: dict[str, Any] = {"summary": summary, "responses": responses}
    if request is not None:
        schema = {"schema": {"$ref": _REF.format(model=request)}}
        operation["requestBody"] = {"required": True, "content": {"application/json": schema}}
    return operation
