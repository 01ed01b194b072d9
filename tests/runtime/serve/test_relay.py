"""Answers passed on from replicas that die at any point: asked again until something was sent, then an error."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from n3c.runtime.serve.relay import Head, ReplicaLostError, relay, says_something
from n3c.runtime.serve.streaming import event

PLAIN: Head = (200, [(b"content-type", b"application/json")])
STREAM: Head = (200, [(b"Content-Type", b"text/event-stream; charset=utf-8")])
ROLE = event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"


def said(text: str) -> bytes:
    return event({"choices": [{"delta": {"content": text}}]})


Script = tuple[list[Head | bytes], bool]
"""What a replica sends, and whether it dies then."""


def relayed(*scripts: Script) -> tuple[int, bytes, int]:
    """Return the status and body that a client gets, and how many replicas were asked."""
    coming, sent = list(scripts), list[Any]()

    async def ask() -> AsyncIterator[Head | bytes]:
        pieces, dies = coming.pop(0)
        for piece in pieces:
            yield piece
        if dies:
            raise ReplicaLostError

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(relay(ask, send, pauses=[0.0] * 3))
    assert [message["type"] for message in sent[:1]] == ["http.response.start"]
    assert all(message["more_body"] for message in sent[1:-1]) and not sent[-1]["more_body"]
    return sent[0]["status"], b"".join(message["body"] for message in sent[1:]), len(scripts) - len(coming)


@pytest.mark.parametrize("dead", [[], [PLAIN], [PLAIN, b'{"tex'], [STREAM], [STREAM, ROLE, PING]])
def test_a_request_whose_replica_dies_before_anything_was_said_is_asked_again(dead: Sequence[Head | bytes]) -> None:
    whole: Script = ([PLAIN, b'{"text"', b': "a"}'], False)
    assert relayed((list(dead), True), whole) == (200, b'{"text": "a"}', 2)
    streamed: Script = ([STREAM, ROLE, said("a"), DONE], False)
    assert relayed((list(dead), True), streamed) == (200, ROLE + said("a") + DONE, 2)


def test_a_stream_that_has_begun_ends_with_an_error() -> None:
    status, body, asked = relayed(([STREAM, ROLE, said("a"), said("b")], True), ([STREAM, said("z"), DONE], False))
    begun, _, last = body.rpartition(b"data: ")
    assert status == 200 and asked == 1 and begun == ROLE + said("a") + said("b")
    assert json.loads(last)["error"]["code"] == "replica_lost"


def test_a_client_is_told_where_no_replica_answers() -> None:
    script: Script = ([PLAIN, b"{"], True)
    status, body, asked = relayed(*[script] * 3)
    assert (status, asked, json.loads(body)["error"]["code"]) == (503, 3, "no_replica")


def test_an_error_of_a_replica_is_an_answer() -> None:
    full: Script = ([(429, [(b"content-type", b"application/json"), (b"retry-after", b"1")]), b"{}"], False)
    assert relayed(full) == (429, b"{}", 1)


def test_events_stream_as_they_come() -> None:
    """What is sent is not held back for what follows it."""
    sent: list[bytes] = []

    async def ask() -> AsyncIterator[Head | bytes]:
        yield STREAM
        for text in "abc":
            yield said(text)
            assert sent[-1] == said(text)

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))

    asyncio.run(relay(ask, send))
    assert len(sent) == 1 + 3 + 1


@pytest.mark.parametrize(
    ("piece", "expected"),
    [
        (PING, False),
        (ROLE, False),
        (said("a"), True),
        (event({"choices": [{"text": "a"}]}), True),
        (event({"choices": [], "usage": {}}), True),
        (event({"error": {}}), True),
        (DONE, True),
    ],
)
def test_what_is_held_back(piece: bytes, expected: bool) -> None:
    assert says_something(piece) is expected
