"""From a request to the work of its sequences: prompts, options and grammar, each within the server's limits."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, cast

from n3c.runtime.generation.grammar import Grammar
from n3c.runtime.generation.sampling import Sampling
from n3c.runtime.generation.sequence import Options

from .constraint import constraint, require_small
from .errors import ApiError
from .requests import ChatRequest, CompletionRequest, Message, Request
from .scheduler import Work
from .served_model import ServedModel
from .tool_calls import BEGIN, END

LEAST_TOP_P = 1e-6
"""What 0 stands for, which only the likeliest token passes."""
SHOWN = frozenset(("<think>", "</think>", BEGIN, END))
"""Special tokens that the text of a chat keeps, for what stands between them is told apart."""


def completion_works(served: ServedModel, request: CompletionRequest) -> list[Work]:
    """Return the sequences of a completion: `n` for each prompt, in this order."""
    prompts, n = _prompts(served, request.prompt), _choices(served, request, 1)
    if request.best_of not in (None, n):
        raise ApiError(400, "best_of: it is supported only where it equals n", param="best_of")
    _require_top(served, "logprobs", request.logprobs)
    if len(prompts) * n > served.limits.choices:
        raise ApiError(400, f"{len(prompts)} prompts with n = {n}: more than {served.limits.choices}", param="n")
    options = _options(
        served,
        request,
        limit=16 if request.max_tokens is None else request.max_tokens,
        logprobs=request.logprobs,
        prompt_logprobs=bool(request.echo) and request.logprobs is not None,
    )
    return [Work(tuple(prompt), options, index) for prompt in prompts for index in range(n)]


def chat_works(served: ServedModel, request: ChatRequest) -> list[Work]:
    """Return the sequences of a chat: `n` of one prompt."""
    limits = served.limits
    n = _choices(served, request, 1)
    if len(request.messages) > limits.messages:
        raise ApiError(400, f"more than {limits.messages} messages", param="messages")
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs", param="top_logprobs")
    _require_top(served, "top_logprobs", request.top_logprobs)
    variables = _variables(served, request)
    limit = request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens
    options = _options(
        served,
        request,
        limit=served.service.scheduler.batch.capacity.context_length if limit is None else limit,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        grammar=constraint(served, request),
        shown=SHOWN,
    )
    prompt = tuple(served.chat([_message(each) for each in request.messages], variables))
    return [Work(prompt, options, index) for index in range(n)]


def _prompts(served: ServedModel, prompt: str | Sequence[Any]) -> list[list[int]]:
    listed: Sequence[Any] = [prompt] if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else prompt
    if not listed:
        raise ApiError(400, "there is no prompt", param="prompt")
    if len(listed) > served.limits.choices:
        raise ApiError(400, f"more than {served.limits.choices} prompts", param="prompt")
    return [served.prompt(each) if isinstance(each, str) else list(cast("Sequence[int]", each)) for each in listed]


def _choices(served: ServedModel, request: Request, default: int) -> int:
    n = default if request.n is None else request.n
    if n > served.limits.choices:
        raise ApiError(400, f"n: more than {served.limits.choices}", param="n")
    return n


def _require_top(served: ServedModel, name: str, count: int | None) -> None:
    most = min(served.limits.top_logprobs, served.vocab_size)
    if count is not None and count > most:
        raise ApiError(400, f"{name}: more than {most}", param=name)


def _options(
    served: ServedModel,
    request: Request,
    *,
    limit: int,
    logprobs: int | None,
    prompt_logprobs: bool = False,
    grammar: Grammar | None = None,
    shown: frozenset[str] = frozenset(),
) -> Options:
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if len(stops) > served.limits.stops or any(len(stop) > served.limits.stop_characters for stop in stops):
        message = f"stop: at most {served.limits.stops} texts of {served.limits.stop_characters} characters"
        raise ApiError(400, message, param="stop")
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options needs stream", param="stream_options")
    ends = [*(request.stop_token_ids or ()), *(() if request.ignore_eos else served.eos_ids)]
    reasons = request.reasoning_budget is not None or grammar is not None
    return Options(
        max_new_tokens=limit,
        sampling=_sampling(served, request),
        stop_ids=frozenset(ends),
        stop_texts=tuple(stop for stop in stops if stop),
        shown=shown,
        tags=served.tags if reasons else None,
        reasoning_budget=request.reasoning_budget,
        grammar=grammar,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def _sampling(served: ServedModel, request: Request) -> Sampling:
    """Return how tokens are drawn; without a seed the random numbers are new each time."""
    bias = {int(token): float(value) for token, value in (request.logit_bias or {}).items()}
    wrong = next((token for token in bias if token >= served.vocab_size), None)
    if wrong is not None:
        raise ApiError(400, f"logit_bias: there is no token {wrong}", param="logit_bias")
    return Sampling(
        temperature=1.0 if request.temperature is None else request.temperature,
        top_k=max(0, request.top_k or 0),
        top_p=1.0 if request.top_p is None else max(request.top_p, LEAST_TOP_P),
        min_p=request.min_p or 0.0,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        repetition_penalty=1.0 if request.repetition_penalty is None else request.repetition_penalty,
        logit_bias=bias,
        seed=secrets.randbits(62) if request.seed is None else request.seed % 2**63,
    )


def _variables(served: ServedModel, request: ChatRequest) -> dict[str, Any]:
    """Return what the template reads beside the messages."""
    variables = dict(request.chat_template_kwargs or {})
    require_small(served, "chat_template_kwargs", variables)
    reserved = {"messages", "tools", "add_generation_prompt"} & variables.keys()
    if reserved or not all(name.isidentifier() for name in variables):
        raise ApiError(400, "chat_template_kwargs: a name that it must not have", param="chat_template_kwargs")
    if request.tools and request.tool_choice != "none":
        tools = [tool.model_dump(exclude_none=True) for tool in request.tools]
        require_small(served, "tools", tools)
        variables["tools"] = tools
    return variables


def _message(message: Message) -> Mapping[str, object]:
    """Return a message as templates read it: its content as one text, arguments of calls as objects."""
    given = message.model_dump(exclude_none=True)
    if message.content is None:
        given["content"] = ""
    elif not isinstance(message.content, str):
        given["content"] = "".join(part.text for part in message.content)
    if message.tool_calls:
        given["tool_calls"] = [
            {**call, "function": {"name": call["function"]["name"], "arguments": _arguments(call["function"])}}
            for call in given["tool_calls"]
        ]
    return given


def _arguments(function: Mapping[str, str]) -> object:
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError) as error:
        message = f"messages: the arguments of `{function['name']}` are not JSON"
        raise ApiError(400, message, param="messages") from error
    if not isinstance(arguments, dict):
        raise ApiError(400, f"messages: the arguments of `{function['name']}` are no object", param="messages")
    return cast("dict[str, object]", arguments)
