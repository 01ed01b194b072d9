"""/v1/completions: texts continued."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from n3c.runtime.generation.tokenizer import decoded

from .answer_head import Head
from .exchange import Exchange
from .logprob_forms import completion_form
from .plan import completion_works
from .requests import CompletionRequest, parsed
from .scheduler import Ticket, Update, Work
from .served_model import ServedModel
from .streaming import EventStream, unless_gone
from .usage import usage, usage_so_far


async def completions(served: ServedModel, http: HttpRequest) -> Response:
    """Answer a request."""
    request = parsed(CompletionRequest, await http.body())
    served.require(request.model)
    works = completion_works(served, request)
    head = Head("cmpl", "text_completion", served.name)
    if request.stream:
        exchange = Exchange(served.service, works)
        return EventStream(_chunks(served, request, exchange, head), exchange.close)
    return await unless_gone(http, _whole(served, request, works, head))


async def _whole(served: ServedModel, request: CompletionRequest, works: Sequence[Work], head: Head) -> Response:
    with Exchange(served.service, works) as exchange:
        choices = [_Choice(served, request, ticket) for ticket in exchange.tickets]
        pieces: list[list[dict[str, Any]]] = [[] for _ in choices]
        async for index, update in exchange.updates():
            pieces[index].append(choices[index].feed(update))
    tokens = sum(choice.count for choice in choices)
    listed = [{"index": index, **_joined(each)} for index, each in enumerate(pieces)]
    counted = usage(exchange.tickets, tokens, _prompts(request))
    return JSONResponse({**head.fields(), "choices": listed, "usage": counted})


async def _chunks(
    served: ServedModel, request: CompletionRequest, exchange: Exchange, head: Head
) -> AsyncGenerator[dict[str, Any]]:
    choices = [_Choice(served, request, ticket) for ticket in exchange.tickets]
    options = request.stream_options

    def counted() -> dict[str, Any]:
        return usage(exchange.tickets, sum(choice.count for choice in choices), _prompts(request))

    async for index, update in exchange.updates():
        choice = {"index": index, **choices[index].feed(update)}
        yield {**head.fields(), "choices": [choice], **usage_so_far(options, counted)}
    if options is not None and options.include_usage:
        yield {**head.fields(), "choices": [], "usage": counted()}


def _prompts(request: CompletionRequest) -> int:
    single = isinstance(request.prompt, str) or isinstance(request.prompt[0], int)
    return 1 if single else len(request.prompt)


@dataclass(slots=True)
class _Choice:
    """One continuation, as it grows."""

    served: ServedModel
    request: CompletionRequest
    ticket: Ticket
    count: int = 0
    _offset: int = 0
    _begun: bool = field(default=False)

    def feed(self, update: Update) -> dict[str, Any]:
        """Return text, log-probabilities and the reason of an end that an update brings."""
        self.count += len(update.tokens)
        text = "".join(token.text for token in update.tokens)
        new = [token.logprobs for token in update.tokens if token.logprobs is not None]
        first: int | None = None
        tokenizer = self.served.tokenizer
        if not self._begun and self.request.echo:
            prompt = self.ticket.work.prompt
            text = decoded(tokenizer, prompt) + text
            if self.request.logprobs is not None:
                first, new = prompt[0], [*self.ticket.prompt_logprobs, *new]
        self._begun = True
        logprobs = None
        if self.request.logprobs is not None:
            logprobs = completion_form(tokenizer, new, first, self._offset)
            self._offset += sum(map(len, logprobs["tokens"]))
        return {"text": text, "logprobs": logprobs, "finish_reason": update.ending}


def _joined(pieces: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return pieces of a choice as one."""
    logprobs = [piece["logprobs"] for piece in pieces if piece["logprobs"] is not None]
    return {
        "text": "".join(piece["text"] for piece in pieces),
        "logprobs": {key: [each for one in logprobs for each in one[key]] for key in logprobs[0]} if logprobs else None,
        "finish_reason": pieces[-1]["finish_reason"],
    }
