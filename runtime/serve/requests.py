"""What clients may ask for: OpenAI's parameters, and those that vLLM added to them."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from .errors import ApiError

Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Text = Annotated[str, Field(max_length=1 << 23)]


class _Model(BaseModel):
    """Unknown parameters are refused: they would have no effect."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Model):
    """How an answer is streamed."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    """With `include_usage`: usage so far in every chunk, as load generators ask for it."""
    include_obfuscation: bool = False
    """Has no effect."""


class Request(_Model):
    """What completions and chats have in common."""

    model: str
    temperature: Annotated[Finite, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Finite, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    """0 and -1 keep all."""
    min_p: Annotated[Finite, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[Finite, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Finite, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[Finite, Field(gt=0, le=10)] | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Annotated[Finite, Field(ge=-100, le=100)]],
            Field(max_length=1024),
        ]
        | None
    ) = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: Annotated[list[Count], Field(max_length=1024)] | None = None
    ignore_eos: bool = False
    n: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Count | None = None
    reasoning_budget: Count | None = None
    """Tokens between the thinking tags at most."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    """Has no effect, as the following."""
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class CompletionRequest(Request):
    """The body of /v1/completions."""

    prompt: Text | list[Text] | list[Count] | list[list[Count]]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0)] | None = None
    suffix: None = None
    best_of: Annotated[int, Field(ge=1)] | None = None


class Function(_Model):
    """A function that the model may call."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Model):
    """A tool: a function."""

    type: Literal["function"]
    function: Function


class NamedFunction(_Model):
    """The name of a function."""

    name: str


class NamedTool(_Model):
    """A choice of one tool."""

    type: Literal["function"]
    function: NamedFunction


class CalledFunction(_Model):
    """A call that the assistant made; the arguments are JSON."""

    name: str
    arguments: str


class ToolCall(_Model):
    """A call that the assistant made."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class TextPart(_Model):
    """A part of a message; others than texts are not understood."""

    type: Literal["text"]
    text: str


class Message(_Model):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    annotations: list[Any] | None = None
    """Has no effect, as the following: clients send back what they got."""
    audio: None = None
    function_call: None = None

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError("content_missing", "the content is missing")
        return self


class JsonSchema(_Model):
    """A schema that the answer fits."""

    name: str
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(_Model):
    """What an answer is: text, any JSON object, or JSON that fits a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(Request):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables of the chat template, as `enable_thinking`."""


R = TypeVar("R", bound=Request)


def parsed(kind: type[R], body: bytes) -> R:
    """Return the request that a body holds; ApiError (400) with the first parameter that is wrong."""
    try:
        data = json.loads(body, parse_constant=_refuse_constant)
        json.dumps(data, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ApiError(400, f"the body is not JSON: {reason}", code="invalid_json") from error
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise _explained(error) from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _explained(error: ValidationError) -> ApiError:
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    # of the forms that a value may have, the one that it has most of
    first = max((fault for fault in faults if fault["loc"][:1] == faults[0]["loc"][:1]), key=_depth)
    param = str(first["loc"][0]) if first["loc"] else None
    place = ".".join(str(part) for part in first["loc"] if part != "str" and "[" not in str(part))
    unknown = first["type"] == "extra_forbidden"
    reason = "unknown parameter" if unknown else first["msg"]
    message = f"{place or 'the body'}: {reason}"
    return ApiError(400, message, param=param, code="unknown_parameter" if unknown else "invalid_value")


def _depth(fault: ErrorDetails) -> int:
    return len(fault["loc"])
