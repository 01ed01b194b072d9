"""Clients that vanish, at 24 points of a request: it ends before the next round, and nothing of it stays."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from n3c.runtime.engines.interface import Array
from n3c.runtime.serve.http_server import HttpServer
from n3c.runtime.serve.served_model import ServedModel
from support.serving_http import listening, scripted_served
from support.small_tokenizer import VOCAB

WAIT = 30.0
"""Seconds that anything here may take."""


def endless(tokens: Sequence[int]) -> Array:
    """A model that never ends a text."""
    logits = np.zeros(VOCAB, np.float32)
    logits[100 + len(tokens) % 7] = 9
    return logits


def slow_served(built: Path) -> ServedModel:
    """Return a stand-in whose calls take two milliseconds, so that there is time to go away."""
    served = scripted_served(built / "weights", endless)
    engine: Any = served.service.scheduler.batch.engine
    run = engine.run

    def slowly(entry: str, inputs: Any) -> Any:
        time.sleep(0.002)
        return run(entry, inputs)

    engine.run = slowly
    return served


@pytest.fixture(scope="module")
def server(built: Path) -> Iterator[HttpServer]:
    with listening(slow_served(built)) as running:
        yield running


def request(path: str, stream: bool, tokens: int = 400) -> bytes:
    prompt = {"prompt": "You"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "x"}]}
    options = {"max_tokens": tokens, "stream": stream, "n": 3, "ignore_eos": True}  # none ends by chance
    body = json.dumps({"model": "small", **options, **prompt}).encode()
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def read(chunks: int) -> Callable[[socket.socket], None]:
    """Return what reads so many events of a stream."""

    def wait(connection: socket.socket) -> None:
        seen = b""
        while seen.count(b"data: ") < chunks:
            piece = connection.recv(65536)
            assert piece, f"the server closed the stream after {seen!r}"
            seen += piece

    return wait


PATHS = ("/v1/completions", "/v1/chat/completions")
SENT = [(path, False, part) for path in PATHS for part in (0, 9, 60, 110)]
"""Bytes of a request that come before the client goes."""
WHOLE = [(path, stream, rounds) for path in PATHS for stream in (False, True) for rounds in (0, 5)]
"""Rounds that the request runs before."""
READ = [(path, chunks) for path in PATHS for chunks in (1, 4, 9, 30)]
"""Events of a stream that are read before."""


def some(points: Sequence[tuple[Any, ...]], *ordinary: int) -> list[Any]:
    """Return all points, but those at `ordinary` slow."""
    return [pytest.param(*p, marks=() if i in ordinary else pytest.mark.slow) for i, p in enumerate(points)]


def test_there_are_24() -> None:
    assert len(SENT) + len(WHOLE) + len(READ) == 24


def settled(server: HttpServer, condition: Callable[[], bool]) -> None:
    """Wait until it is so, 30 seconds at most."""
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end, f"not so after {WAIT} s; sequences ended: {endings(server)}"
        threading.Event().wait(0.002)


def endings(server: HttpServer) -> dict[str, float]:
    """Return how many sequences ended, by reason."""
    lines = server.served.metrics.text().decode().splitlines()
    rows = [line.split() for line in lines if line.startswith("n3c_sequences_total{")]
    return {name.split('"')[1]: float(value) for name, value in rows}


def vanish(connection: socket.socket, reset: bool) -> None:
    if reset:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def assert_nothing_stays(server: HttpServer, before: dict[str, float], interrupted: int) -> None:
    service = server.served.service
    settled(server, lambda: endings(server).get("interrupted", 0) == before.get("interrupted", 0) + interrupted)
    settled(server, lambda: service.scheduler.idle)
    assert not service.scheduler.batch.rows and service.waiting == 0
    assert endings(server).get("length", 0) == before.get("length", 0)


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize(("path", "stream", "part"), some(SENT, 1, 4, 7))
def test_before_the_request_is_whole(server: HttpServer, path: str, stream: bool, part: int, reset: bool) -> None:
    before = endings(server)
    connection = socket.create_connection(server.socket.getsockname()[:2], WAIT)
    connection.sendall(request(path, stream)[:part])
    vanish(connection, reset)
    assert_nothing_stays(server, before, 0)


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize(("path", "stream", "rounds"), some(WHOLE, 1, 4, 7))
def test_while_it_runs(server: HttpServer, path: str, stream: bool, rounds: int, reset: bool) -> None:
    before, batch = endings(server), server.served.service.scheduler.batch
    connection = socket.create_connection(server.socket.getsockname()[:2], WAIT)
    start = batch.rounds
    connection.sendall(request(path, stream, 3000))
    settled(server, lambda: len(batch.rows) == 3 and batch.rounds >= start + rounds)
    vanish(connection, reset)
    assert_nothing_stays(server, before, 3)


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize(("path", "chunks"), some(READ, 0, 7))
def test_while_it_is_read(server: HttpServer, path: str, chunks: int, reset: bool) -> None:
    before = endings(server)
    connection = socket.create_connection(server.socket.getsockname()[:2], WAIT)
    connection.sendall(request(path, stream=True, tokens=3000))
    read(chunks)(connection)
    vanish(connection, reset)
    assert_nothing_stays(server, before, 3)


def test_a_client_that_reads_nothing_holds_no_row(built: Path) -> None:
    """Its answer is made and waits; the rows are free for others."""
    with listening(slow_served(built), grace=0) as server, socket.socket() as connection:
        connection.settimeout(WAIT)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(server.socket.getsockname()[:2])
        connection.sendall(request("/v1/completions", stream=True))
        settled(server, lambda: endings(server).get("length", 0) == 3)
        assert server.served.service.scheduler.idle


def test_an_end_while_streams_run_is_told(built: Path) -> None:
    """A stream that breaks off must not look like a whole answer: there is an error, and no [DONE]."""
    answers: list[bytes] = []
    with listening(slow_served(built), grace=0) as server:
        connection = socket.create_connection(server.socket.getsockname()[:2], WAIT)
        connection.sendall(request("/v1/completions", stream=True))
        read(3)(connection)
        server.end()
        while piece := connection.recv(65536):
            answers.append(piece)
    told = b"".join(answers)
    assert b"[DONE]" not in told
    event = next(line for line in told.splitlines() if line.startswith(b'data: {"error"'))
    error: Any = json.loads(event.removeprefix(b"data: "))["error"]
    assert error["code"] == "shutting_down"


def test_what_runs_is_finished_within_the_grace(built: Path) -> None:
    with listening(slow_served(built), grace=60) as server:
        connection = socket.create_connection(server.socket.getsockname()[:2], WAIT)
        connection.sendall(request("/v1/completions", stream=True))
        read(3)(connection)
        server.end()
        told = b""
        while piece := connection.recv(65536):
            told += piece
    assert told.rstrip().endswith(b"0") and b"data: [DONE]" in told


def test_comments_come_where_no_event_does(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("n3c.runtime.serve.streaming.PING_SECONDS", 0.05)
    with listening(slow_served(built)) as server:
        service = server.served.service
        service.pause()
        connection = socket.create_connection(server.socket.getsockname()[:2], WAIT)
        connection.sendall(request("/v1/completions", stream=True, tokens=3))
        seen = b""
        while seen.count(b": ping\n\n") < 2:
            seen += (piece := connection.recv(65536))
            assert piece
        assert b"data: " not in seen
        service.resume()
        while b"data: [DONE]\n\n" not in seen:
            seen += (piece := connection.recv(65536))
            assert piece
        connection.close()
