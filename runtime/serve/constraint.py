"""What the answer to a chat must be, by its tools and its response format: a grammar, or nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast

from n3c.ir.diagnostics import N3CError
from n3c.runtime.generation.grammar import ANY_OBJECT, Grammar

from .errors import ApiError
from .requests import ChatRequest, NamedTool, ResponseFormat
from .served_model import ServedModel
from .tool_calls import schemas
from .tool_grammar import LITERALS, Answer, grammar


def constraint(served: ServedModel, request: ChatRequest) -> Grammar | None:
    """Return what the answer must be: JSON of a schema, calls of tools, either of them; None: any text."""
    schema = _schema(served, request.response_format)
    answer = _with_calls(served, request, schema)
    if schema is None and answer is None:
        return None
    param = "tool_choice" if schema is None else "response_format"
    if served.grammars is None:
        raise ApiError(400, f"{param}: the server lacks llguidance", param=param)
    if answer is None:
        assert schema is not None
        return served.grammars.schema(schema)
    try:
        return served.grammars.lark(grammar(answer, served.added_token))
    except N3CError as error:
        raise ApiError(400, f"tools: {error.diagnostics[0].message}", param="tools", code="E0841") from error


def _schema(served: ServedModel, form: ResponseFormat | None) -> Mapping[str, Any] | None:
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return ANY_OBJECT
    if form.json_schema is None:
        raise ApiError(400, "response_format: json_schema is missing", param="response_format")
    schema = form.json_schema.schema_
    require_small(served, "response_format", schema)
    return schema


def _with_calls(served: ServedModel, request: ChatRequest, schema: Mapping[str, Any] | None) -> Answer | None:
    """Return what an answer with tools may be; None where calls are not asked for, or not held to anything."""
    choice, tools = request.tool_choice, request.tools or []
    required = choice == "required" or isinstance(choice, NamedTool)
    if not tools and (required or request.tools is not None or request.parallel_tool_calls is not None):
        raise ApiError(400, "there are no tools", param="tool_choice" if required else "tools")
    if len({tool.function.name for tool in tools}) < len(tools):
        raise ApiError(400, "tools: two have one name", param="tools")
    several = request.parallel_tool_calls is not False and not isinstance(choice, NamedTool)
    strict = any(tool.function.strict for tool in tools)
    if not tools or choice == "none" or not (required or strict or not several or schema is not None):
        return None
    if isinstance(choice, NamedTool):
        tools = [tool for tool in tools if tool.function.name == choice.function.name]
        if not tools:
            raise ApiError(400, f"there is no tool `{choice.function.name}`", param="tool_choice")
    if served.renderer is None or not all(literal in served.renderer.literals for literal in LITERALS):
        message = "the model's chat template writes calls in a form that answers cannot be held to"
        raise ApiError(400, message, param="tool_choice" if required else "tools", code="unknown_tool_form")
    return Answer(schemas(tools), required, several, schema)


def require_small(served: ServedModel, param: str, value: object) -> None:
    """Raise ApiError (400) for a schema that is too large or nested too deeply."""
    if len(json.dumps(value)) > served.limits.schema_bytes:
        raise ApiError(400, f"{param}: more than {served.limits.schema_bytes:,} bytes", param=param)
    if _depth(value, served.limits.schema_depth) < 0:
        raise ApiError(400, f"{param}: nested deeper than {served.limits.schema_depth}", param=param)


def _depth(value: object, left: int) -> int:
    """Return how many levels of `left` a value leaves; negative where they do not suffice."""
    if left < 0 or not isinstance(value, (dict, list)):
        return left
    held = list(cast("dict[str, object]", value).values()) if isinstance(value, dict) else cast("list[object]", value)
    return min((_depth(each, left - 1) for each in held), default=left - 1)
