"""What clients send wrongly: each gets OpenAI's form of an error, and the server lives on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from n3c.runtime.serve.http_server import HttpServer
from n3c.runtime.serve.limits import Limits
from support.serving_http import guarded, listening, scripted_served

COMPLETION: dict[str, Any] = {"model": "small", "prompt": "You", "max_tokens": 2}
CHAT: dict[str, Any] = {"model": "small", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}


@pytest.fixture
def http(server: HttpServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client
        assert client.post("/v1/completions", json=COMPLETION).status_code == 200
        assert server.served.service.scheduler.idle


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """Return the error, in OpenAI's form."""
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and error["message"]
    return dict(error)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"3", b'"x"', b"\xff\xfe", b'{"a": NaN}', b"[" * 10**5, b'{"a": "\\ud800"}', b"{}"],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_bodies_that_are_none(http: httpx.Client, path: str, body: bytes) -> None:
    answer = http.post(path, content=body)
    assert answer.status_code == 400
    error_of(answer)


IMAGE = {"type": "image_url", "image_url": {"url": "file:/etc"}}


def called(arguments: str) -> dict[str, Any]:
    """Return messages with a call that the assistant made."""
    call = {"function": {"name": "f", "arguments": arguments}}
    return {"messages": [{"role": "assistant", "tool_calls": [call]}]}


def deep(levels: int) -> dict[str, Any]:
    """Return a schema of so many levels."""
    return {"properties": {"a": deep(levels - 1)}} if levels else {}


@pytest.mark.parametrize(
    ("changes", "status", "param"),
    [
        ({"model": "other"}, 404, "model"),
        ({"model": 3}, 400, "model"),
        ({"prompt": None}, 400, "prompt"),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": [[]]}, 400, "prompt"),
        ({"prompt": [1, "a"]}, 400, "prompt"),
        ({"prompt": [1, -1]}, 400, "prompt"),
        ({"prompt": [10**30]}, 400, "prompt"),
        ({"prompt": [1, 320]}, 400, "prompt"),
        ({"prompt": "a" * 4000}, 400, "prompt"),
        ({"prompt": ["a"] * 17}, 400, "prompt"),
        ({"n": 17}, 400, "n"),
        ({"n": 10**9}, 400, "n"),
        ({"n": 0}, 400, "n"),
        ({"prompt": ["a"] * 9, "n": 2}, 400, "n"),
        ({"best_of": 3}, 400, "best_of"),
        ({"max_tokens": -1}, 400, "max_tokens"),
        ({"max_tokens": "3"}, 400, "max_tokens"),
        ({"max_tokens": 2.5}, 400, "max_tokens"),
        ({"temperature": -0.1}, 400, "temperature"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"top_p": -0.1}, 400, "top_p"),
        ({"min_p": 1.1}, 400, "min_p"),
        ({"presence_penalty": 3}, 400, "presence_penalty"),
        ({"repetition_penalty": 0}, 400, "repetition_penalty"),
        ({"logit_bias": {"x": 1}}, 400, "logit_bias"),
        ({"logit_bias": {"400": 1}}, 400, "logit_bias"),
        ({"logit_bias": {"1": 101}}, 400, "logit_bias"),
        ({"logprobs": 21}, 400, "logprobs"),
        ({"seed": 2**64}, 400, "seed"),
        ({"stop": ["x"] * 17}, 400, "stop"),
        ({"stop": "x" * 1025}, 400, "stop"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
        ({"suffix": "x"}, 400, "suffix"),
        ({"what": 1}, 400, "what"),
        ({"chat_template": "{{ x }}"}, 400, "chat_template"),
    ],
)
def test_completions(http: httpx.Client, changes: dict[str, Any], status: int, param: str) -> None:
    for stream in (False, True):
        answer = http.post(
            "/v1/completions",
            json=COMPLETION | changes | ({"stream": True} if stream and "stream_options" not in changes else {}),
        )
        assert (answer.status_code, error_of(answer)["param"]) == (status, param)


def form(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "x"}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages"),
        (called("{"), "messages"),
        (called("[]"), "messages"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
        (form({"type": "nope"}), "response_format"),
        (form({"not": {}}), "response_format"),
        (form({"$ref": "file:/etc/passwd"}), "response_format"),
        (form({"$ref": "http://127.0.0.1/x"}), "response_format"),
        (form({"type": "string", "pattern": "(?=a)b"}), "response_format"),
        (form({"type": "string", "pattern": "("}), "response_format"),
        (form({"enum": ["x" * 70_000]}), "response_format"),
        (form(deep(100)), "response_format"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f", "description": "x" * 70_000}}]}, "tools"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"a b": 1}}, "chat_template_kwargs"),
    ],
)  # fmt: skip
def test_chats(http: httpx.Client, changes: dict[str, Any], param: str) -> None:
    answer = http.post("/v1/chat/completions", json=CHAT | changes)
    assert (answer.status_code, error_of(answer)["param"]) == (400, param)


def test_paths_and_methods(http: httpx.Client) -> None:
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/completions", 405),
        ("POST", "/v1/models", 405),
        ("GET", "/v1/models/a/b", 404),
    ):
        answer = http.request(method, path)
        assert answer.status_code == status
        error_of(answer)
    assert http.get("/health").json() == {"status": "ok"}
    assert "n3c_time_to_first_token_seconds_bucket" in http.get("/metrics").text


def test_heads_and_options(http: httpx.Client) -> None:
    head = http.head("/v1/models")
    assert (head.status_code, head.content) == (200, b"") and head.headers["content-type"] == "application/json"
    answer = http.options("/v1/completions")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    error_of(answer)


def test_the_type_of_a_body_does_not_matter(http: httpx.Client) -> None:
    """curl's `-d` says that it is a form."""
    for kind in ("application/x-www-form-urlencoded", "text/plain", "x"):
        headers = {"Content-Type": kind}
        assert http.post("/v1/completions", content=json.dumps(COMPLETION), headers=headers).status_code == 200


def test_what_is_wrong_in_a_message_is_named(http: httpx.Client) -> None:
    for messages, reason in (
        ([{"role": "user", "content": [{"type": "text", "text": "x"}, IMAGE]}], "messages.0.content.1.type: "),
        ([{"role": "user", "content": None}], "messages.0: the content is missing"),
        ([{"role": "user"}], "messages.0: the content is missing"),
        ([{"role": "user", "content": "x", "what": 1}], "messages.0.what: unknown parameter"),
    ):
        answer = http.post("/v1/chat/completions", json=CHAT | {"messages": messages})
        assert answer.status_code == 400 and error_of(answer)["message"].startswith(reason), error_of(answer)


def test_a_large_body(http: httpx.Client) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(1 << 12):
            yield b" " * 65536
        raise AssertionError("the server reads it all")

    answer = http.post("/v1/completions", content=b" " * (8_000_001))
    assert (answer.status_code, error_of(answer)["code"]) == (413, "body_too_large")
    assert http.post("/v1/completions", content=endless()).status_code == 413


def test_the_typed_errors_of_the_client(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model="small", prompt="a" * 4000)
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="other", prompt="a")
    assert missing.value.code == "model_not_found"


@pytest.fixture(scope="module")
def limited(built: Any) -> Iterator[HttpServer]:
    """A stand-in that takes a key, a short queue and little time for bodies; it never ends by itself."""
    import numpy as np

    def model(tokens: Any) -> Any:
        logits = np.zeros(320, np.float32)
        logits[100 + len(tokens) % 7] = 9
        return logits

    limits = Limits(queue=3, body_seconds=2.0)
    served = guarded(scripted_served(built / "weights", model, limits=limits), api_key="secret")
    with listening(served) as running:
        yield running


def test_the_key(limited: HttpServer) -> None:
    for key in ("", "Bearer", "Bearer wrong", "Bearer secretx", "secret", "Basic secret"):
        for path in ("/v1/models", "/metrics", "/openapi.json"):
            answer = httpx.get(limited.url + path, headers={"Authorization": key})
            assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
    assert httpx.get(limited.url + "/health").status_code == 200
    assert httpx.get(limited.url + "/v1/models", headers={"Authorization": "bearer secret"}).status_code == 200
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{limited.url}/v1", api_key="wrong").models.list()
    assert openai.OpenAI(base_url=f"{limited.url}/v1", api_key="secret").models.list().data


@pytest.fixture
def most_files() -> Iterator[int]:
    """How many files this process may open: 4,096 where its limit can be raised so far, which is often 1,024."""
    resource = pytest.importorskip("resource")
    before, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 4096 if hard == resource.RLIM_INFINITY else min(hard, 4096)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    yield most
    resource.setrlimit(resource.RLIMIT_NOFILE, (before, hard))


def test_a_thousand_at_once(limited: HttpServer, most_files: int) -> None:
    """Seven have a place; the others are refused, at once and politely, and none is lost."""
    count = min(1000, most_files // 2 - 100)  # both ends are this process's
    body = json.dumps(COMPLETION | {"max_tokens": 8}).encode()
    head = f"Host: x\r\nAuthorization: Bearer secret\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    request = b"POST /v1/completions HTTP/1.1\r\n" + head.encode() + body

    async def one() -> bytes:
        reader, writer = await asyncio.open_connection(*limited.socket.getsockname()[:2])
        writer.write(request)
        answer = await reader.read()
        writer.close()
        return answer

    async def ask() -> list[bytes]:
        return list(await asyncio.gather(*(one() for _ in range(count))))

    answers = asyncio.run(ask())
    statuses = [int(answer.split()[1]) for answer in answers]
    assert set(statuses) == {200, 429} and statuses.count(200) >= 7
    refused = answers[statuses.index(429)]
    assert b"retry-after: 1\r\n" in refused.lower()
    assert json.loads(refused.split(b"\r\n\r\n")[1])["error"]["type"] == "rate_limit_error"
    assert limited.served.service.scheduler.idle


def test_a_client_that_sends_slowly(limited: HttpServer) -> None:
    import socket

    with socket.create_connection(limited.socket.getsockname()[:2]) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\nContent-Length: 99\r\n\r\n{"
        )
        connection.settimeout(30)
        answer = b""
        while not answer.endswith(b"}"):  # head and body may come apart
            answer += (piece := connection.recv(65536))
            assert piece, answer
        assert b" 408 " in answer.split(b"\r\n")[0]
        assert json.loads(answer.split(b"\r\n\r\n")[1])["error"]["code"] == "timeout"


def test_a_grammar_that_fails_alone(server: HttpServer, client: openai.OpenAI) -> None:
    """Weights of one row that are not finite fail that request; its neighbours go on."""
    batch = server.served.service.scheduler.batch
    run = batch.engine.run

    def broken(entry: str, inputs: Any) -> Any:
        outputs = run(entry, inputs)
        for row, sequence in enumerate(batch.rows):
            if sequence.prompt[0] == 7 and row < len(outputs["logits"]):
                outputs["logits"][row] = float("nan")
        return outputs

    batch.engine.run = broken  # type: ignore[method-assign]
    try:

        async def ask() -> list[httpx.Response]:
            async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
                bodies = [COMPLETION | {"prompt": [first, 9, 11], "max_tokens": 8} for first in (5, 7, 6)]
                return list(await asyncio.gather(*(http.post("/v1/completions", json=body) for body in bodies)))

        answers = asyncio.run(ask())
    finally:
        batch.engine.run = run  # type: ignore[method-assign]
    assert [answer.status_code for answer in answers] == [200, 500, 200]
    assert error_of(answers[1])["type"] == "server_error"
    assert client.completions.create(model="small", prompt=[7, 9, 11], max_tokens=2).choices


def test_an_engine_that_fails_fails_those_that_run_and_no_others(server: HttpServer, client: openai.OpenAI) -> None:
    batch = server.served.service.scheduler.batch
    run = batch.engine.run

    def broken(entry: str, inputs: Any) -> Any:
        raise RuntimeError("out of memory")

    expected = client.completions.create(model="small", prompt=[3, 4], max_tokens=6, temperature=0).choices[0].text
    batch.engine.run = broken  # type: ignore[method-assign]
    with pytest.raises(openai.InternalServerError):
        client.completions.create(model="small", prompt=[1, 2], max_tokens=6)
    batch.engine.run = run  # type: ignore[method-assign]
    again = client.completions.create(model="small", prompt=[3, 4], max_tokens=6, temperature=0).choices[0].text
    assert again == expected
