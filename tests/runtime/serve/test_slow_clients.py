"""Clients that send or read slowly: each is bounded, the others do not notice, and no connection stays."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from n3c.runtime.serve.http_server import HttpServer
from n3c.runtime.serve.limits import Limits
from support.serving_http import guarded, listening, scripted_served
from support.small_tokenizer import VOCAB

WAIT = 30.0
"""Seconds after which something hangs."""
KEY = "Authorization: Bearer secret\r\n"
HEAD = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\n{KEY}"


@pytest.fixture(scope="module")
def server(built: Path) -> Iterator[HttpServer]:
    def endless(tokens: Any) -> Any:
        logits = np.zeros(VOCAB, np.float32)
        logits[100 + len(tokens) % 7] = 9
        return logits

    limits = Limits(head_seconds=0.6, body_seconds=0.6, unread_seconds=0.6)
    served = guarded(scripted_served(built / "weights", endless, limits=limits), api_key="secret")
    with listening(served) as running:
        yield running


@pytest.fixture
def connection(server: HttpServer) -> Iterator[socket.socket]:
    with socket.create_connection(server.socket.getsockname()[:2], WAIT) as opened:
        yield opened


def drip(connection: socket.socket, data: bytes) -> bytes:
    """Send a byte now and then, for ever, until the server closes the connection; return what it says."""
    ended = threading.Event()

    def send() -> None:
        at = 0
        while not ended.wait(0.02):
            try:
                connection.sendall(data[at % len(data) :][:1])
            except OSError:
                return
            at += 1

    sending = threading.Thread(target=send)
    sending.start()
    told = b""
    try:
        while piece := connection.recv(65536):
            told += piece
    except ConnectionResetError:  # it was closed before our last byte came
        pass
    finally:
        ended.set()
        sending.join()
    return told


def error_of(answer: bytes) -> tuple[int, str]:
    """Return the status and the code of the last answer."""
    head, _, body = answer.rpartition(b"\r\n\r\n")
    assert b"connection: close" in head.lower()
    return int(head.rpartition(b"HTTP/1.1 ")[2].split()[0]), json.loads(body)["error"]["code"]


def test_a_head_that_never_ends(connection: socket.socket) -> None:
    head = b"GET /health HTTP/1.1\r\n" + b"X-Header: and so on\r\n" * 10**4
    assert error_of(drip(connection, head)) == (408, "timeout")


def test_a_connection_on_which_nothing_comes(connection: socket.socket) -> None:
    assert connection.recv(65536) == b""


def test_the_head_of_a_second_request(connection: socket.socket) -> None:
    connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    assert b"200 OK" in connection.recv(65536)
    assert error_of(drip(connection, b"GET /health HTTP/1.1\r\nHost: " + b"x" * 10**4)) == (408, "timeout")


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_never_ends(connection: socket.socket, chunked: bool) -> None:
    framing, data = ("Transfer-Encoding: chunked", b"1\r\n \r\n") if chunked else ("Content-Length: 9000", b" ")
    connection.sendall(f"{HEAD}{framing}\r\n\r\n".encode())
    assert error_of(drip(connection, data)) == (408, "timeout")


def test_a_body_of_a_request_that_is_refused(connection: socket.socket) -> None:
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9000\r\n\r\n")
    assert b" 401 " in drip(connection, b" ")


def test_an_answer_that_nobody_reads(server: HttpServer) -> None:
    """The connection is broken off; the answer that waits for it does not stay in memory."""
    body = json.dumps({"model": "small", "prompt": "x", "max_tokens": 500, "n": 4, "stream": True, "logprobs": 20})
    # what the system takes of it, which else is as much as it likes; an accepted connection has it of the listening one
    server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
    with socket.socket() as connection:
        connection.settimeout(WAIT)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(server.socket.getsockname()[:2])
        connection.sendall(f"{HEAD}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        settled(lambda: len(server.served.service.scheduler.batch.rows) > 0)
        settled(lambda: server.served.service.scheduler.idle)
        settled(lambda: not server.connections)
        told = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := connection.recv(65536):
                told += piece
        assert told and b"[DONE]" not in told


def settled(condition: Callable[[], bool]) -> None:
    waiting = threading.Event()
    for _ in range(int(WAIT / 0.01)):
        if condition():
            return
        waiting.wait(0.01)
    raise AssertionError("not so after a while")


def test_others_do_not_notice_and_nothing_stays(server: HttpServer) -> None:
    slow = [socket.create_connection(server.socket.getsockname()[:2], WAIT) for _ in range(200)]
    for each in slow:
        each.sendall(b"GET /health HTTP/1.1\r\nHost:")
    body = {"model": "small", "prompt": "x", "max_tokens": 2}
    with httpx.Client(headers={"Authorization": "Bearer secret"}, timeout=WAIT) as client:
        assert client.post(f"{server.url}/v1/completions", json=body).status_code == 200
    for each in slow:
        assert b" 408 " in each.recv(65536)
        each.close()
    settled(lambda: not server.connections)


def test_what_is_no_http(connection: socket.socket) -> None:
    connection.sendall(b"\x16\x03\x01 is TLS\r\n\r\n")
    answer = b""
    while piece := connection.recv(65536):
        answer += piece
    assert error_of(answer) == (400, "invalid_http")


def test_no_other_protocol_is_taken_up(connection: socket.socket) -> None:
    upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: eA==\r\n"
    connection.sendall(f"GET /v1/models HTTP/1.1\r\nHost: x\r\n{KEY}{upgrade}\r\n".encode())
    assert b" 200 " in connection.recv(65536).split(b"\r\n")[0]
