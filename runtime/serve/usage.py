"""Tokens of an answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .requests import StreamOptions
from .scheduler import Ticket


def usage(tickets: Sequence[Ticket], completion: int, prompts: int, reasoning: int | None = None) -> dict[str, Any]:
    """Return OpenAI's form; the tokens of a prompt count once for all of its `n` choices, of `prompts` in order."""
    step = len(tickets) // prompts
    first = tickets[::step]
    prompt = sum(len(ticket.work.prompt) for ticket in first)
    counted: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(ticket.cached_tokens for ticket in first)},
    }
    if reasoning is not None:
        counted["completion_tokens_details"] = {"reasoning_tokens": reasoning}
    return counted


def usage_so_far(options: StreamOptions | None, now: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the field `usage` of a chunk within a stream: null, what `now` returns, or no field, as was asked for."""
    if options is None or not options.include_usage:
        return {}
    return {"usage": now() if options.continuous_usage_stats else None}
