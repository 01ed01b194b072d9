"""Bounds of what a server takes, so that no client can take it all."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Each is checked before the work that it bounds."""

    body_bytes: int = 8 << 20
    """Of a request."""
    head_seconds: float = 10.0
    """In which the head of a request must have come, from the connection or the first byte on."""
    body_seconds: float = 60.0
    """In which the body of a request must have come."""
    unread_seconds: float = 60.0
    """For which a client may leave an answer unread that waits for it."""
    choices: int = 16
    """`n`, and prompts times `n` of a completion."""
    queue: int = 256
    """Sequences that wait; beyond them requests are refused with status 429."""
    top_logprobs: int = 20
    stops: int = 16
    """Stop strings of a request."""
    stop_characters: int = 1024
    """Of a stop string."""
    schema_bytes: int = 64 << 10
    """Of a JSON schema, and of all tools."""
    schema_depth: int = 64
    messages: int = 4096
    template_seconds: float = 5.0
    """For rendering a chat."""
    template_bytes: int = 1 << 30
    """Address space of the process that renders."""
