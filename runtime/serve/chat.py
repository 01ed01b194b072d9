"""/v1/chat/completions: the answer to a chat, its reasoning and its tool calls."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from .answer_head import Head
from .exchange import Exchange, refusals
from .logprob_forms import chat_form
from .plan import chat_works
from .reasoning_text import ReasoningStream
from .requests import ChatRequest, NamedTool, parsed
from .scheduler import Ticket, Update, Work
from .served_model import ServedModel
from .streaming import EventStream, unless_gone
from .tool_calls import Call, ToolCallStream, schemas
from .usage import usage, usage_so_far


async def chat_completions(served: ServedModel, http: HttpRequest) -> Response:
    """Answer a request."""
    request = parsed(ChatRequest, await http.body())
    served.require(request.model)
    with refusals():  # before a template takes its time
        served.service.require_places(1)
    works = await asyncio.to_thread(chat_works, served, request)
    if request.stream:
        exchange = Exchange(served.service, works)
        head = Head("chatcmpl", "chat.completion.chunk", served.name)
        return EventStream(_chunks(served, request, exchange, head), exchange.close)
    return await unless_gone(http, _whole(served, request, works, Head("chatcmpl", "chat.completion", served.name)))


async def _whole(served: ServedModel, request: ChatRequest, works: Sequence[Work], head: Head) -> Response:
    with Exchange(served.service, works) as exchange:
        choices = [_Choice.begin(served, request, ticket) for ticket in exchange.tickets]
        parts: list[list[_Part]] = [[] for _ in choices]
        async for index, update in exchange.updates():
            parts[index].append(choices[index].feed(update))
    listed = [
        {
            "index": index,
            "message": _message(part),
            "logprobs": _logprobs(part),
            "finish_reason": part[-1].finish_reason,
        }
        for index, part in enumerate(parts)
    ]
    return JSONResponse({**head.fields(), "choices": listed, "usage": _usage(exchange.tickets, choices)})


async def _chunks(
    served: ServedModel, request: ChatRequest, exchange: Exchange, head: Head
) -> AsyncGenerator[dict[str, Any]]:
    choices = [_Choice.begin(served, request, ticket) for ticket in exchange.tickets]
    options = request.stream_options

    def counted() -> dict[str, Any]:
        return _usage(exchange.tickets, choices)

    def chunk(index: int, delta: dict[str, Any], logprobs: Any, reason: str | None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**head.fields(), "choices": [choice], **usage_so_far(options, counted)}

    for index in range(len(choices)):
        yield chunk(index, {"role": "assistant", "content": ""}, None, None)
    async for index, update in exchange.updates():
        part = choices[index].feed(update)
        delta = part.delta()
        if delta or part.logprobs:
            yield chunk(index, delta, part.logprobs, None)
        if part.finish_reason:  # in a chunk of its own, by which clients know that a call is whole
            yield chunk(index, {}, None, part.finish_reason)
    if options is not None and options.include_usage:
        yield {**head.fields(), "choices": [], "usage": counted()}


def _usage(tickets: Sequence[Ticket], choices: Sequence[_Choice]) -> dict[str, Any]:
    tokens, reasoning = sum(each.count for each in choices), sum(each.reasoning_tokens for each in choices)
    return usage(tickets, tokens, 1, reasoning)


@dataclass(slots=True)
class _Part:
    """What an update brings a choice."""

    reasoning: str = ""
    content: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    logprobs: dict[str, Any] | None = None
    finish_reason: str | None = None

    def delta(self) -> dict[str, Any]:
        """Return the form of a stream."""
        delta: dict[str, Any] = {}
        if self.reasoning:
            delta["reasoning_content"] = self.reasoning
        if self.content:
            delta["content"] = self.content
        if self.calls:
            delta["tool_calls"] = self.calls
        return delta


@dataclass(slots=True)
class _Choice:
    """One answer, as it grows."""

    served: ServedModel
    wants_logprobs: bool
    reasoning: ReasoningStream
    tools: ToolCallStream | None
    named: bool
    """Whether the request names the function, which is then no reason to end, as with OpenAI."""
    count: int = 0
    reasoning_tokens: int = 0
    _calls: int = 0

    @staticmethod
    def begin(served: ServedModel, request: ChatRequest, ticket: Ticket) -> _Choice:
        """Return the choice of a sequence, with nothing said."""
        reasoning = ReasoningStream(served.opens_reasoning(ticket.work.prompt))
        offered = request.tools if request.tool_choice != "none" else None
        tools = ToolCallStream(schemas(offered)) if offered else None
        return _Choice(served, bool(request.logprobs), reasoning, tools, isinstance(request.tool_choice, NamedTool))

    def feed(self, update: Update) -> _Part:
        """Return what an update brings."""
        part = _Part()
        for token in update.tokens:
            self.reasoning_tokens += self.reasoning.reasons
            self._add(part, *self.reasoning.feed(token.text))
        self.count += len(update.tokens)
        if self.wants_logprobs:
            listed = [token.logprobs for token in update.tokens if token.logprobs is not None]
            part.logprobs = chat_form(self.served.tokenizer, listed)
        if update.ending is not None:
            self._add(part, *self.reasoning.finish())
            part.content += self.tools.finish() if self.tools is not None else ""
            calls = self._calls and update.ending == "stop" and not self.named
            part.finish_reason = "tool_calls" if calls else update.ending
        return part

    def _add(self, part: _Part, reasoning: str, content: str) -> None:
        part.reasoning += reasoning
        for each in self.tools.feed(content) if self.tools is not None else [content]:
            if isinstance(each, Call):
                part.calls.append(self._call(each))
            else:
                part.content += each

    def _call(self, call: Call) -> dict[str, Any]:
        index, self._calls = self._calls, self._calls + 1
        return {
            "index": index,
            "id": f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }


def _message(parts: Sequence[_Part]) -> dict[str, Any]:
    content, reasoning = "".join(part.content for part in parts), "".join(part.reasoning for part in parts)
    calls = [{k: v for k, v in call.items() if k != "index"} for part in parts for call in part.calls]
    text = content if content or not calls else None
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    return message


def _logprobs(parts: Sequence[_Part]) -> dict[str, Any] | None:
    listed = [part.logprobs for part in parts if part.logprobs is not None]
    return {"content": [each for one in listed for each in one["content"]], "refusal": None} if listed else None
