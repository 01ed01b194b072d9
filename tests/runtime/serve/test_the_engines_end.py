"""The engine's thread ends, by a fault or since it is told to: everyone who waits for it is told, and nobody hangs."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from starlette.testclient import TestClient

from n3c.ir.diagnostics import ExitCode, N3CError
from n3c.runtime.generation.chat_template import ChatTemplate
from n3c.runtime.generation.sequence import Options, Running
from n3c.runtime.serve.app import create_app
from n3c.runtime.serve.http_server import HttpServer, bound
from n3c.runtime.serve.rendering import Renderer
from n3c.runtime.serve.scheduler import Update, Work
from n3c.runtime.serve.served_model import ServedModel
from n3c.runtime.serve.service import DrainingError, Service
from support.serving_http import scripted_served
from support.small_tokenizer import VOCAB

WAIT = 30.0
"""Seconds after which something hangs."""
ENDLESS = Options(max_new_tokens=4000)
COMPLETION = {"model": "small", "prompt": [5, 6], "max_tokens": 4000}


def endless(tokens: Any) -> Any:
    logits = np.zeros(VOCAB, np.float32)
    logits[100 + len(tokens) % 7] = 9
    return logits


@pytest.fixture
def served(built: Path) -> Iterator[ServedModel]:
    model = scripted_served(built / "weights", endless)
    engine: Any = model.service.scheduler.batch.engine
    run, slowly = engine.run, threading.Event()

    def slow(entry: str, inputs: Any) -> Any:
        slowly.wait(0.002)
        return run(entry, inputs)

    engine.run = slow
    yield model
    model.close()


class Fault(BaseException):
    """No exception of an engine, which would fail what runs and nothing else."""


def kill(service: Service) -> None:
    """Let the thread die of a fault in the middle of a round."""

    def fault(*_: Any) -> Any:
        raise Fault("the device is gone")

    engine: Any = service.scheduler.batch.engine
    engine.run = fault


def started(service: Service, options: Options = ENDLESS) -> tuple[list[Update], threading.Event]:
    """Submit a sequence; return its updates, and what is set at its end."""
    updates: list[Update] = []
    ended = threading.Event()

    def deliver(_: int, update: Update) -> None:
        updates.append(update)
        if update.ending is not None:
            ended.set()

    service.submit([Work((5, 6), options)], deliver)
    return updates, ended


def outcome(act: Callable[[], Any]) -> Any:
    """Return what `act` returns or raises, within the time."""
    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(act).exception(WAIT) or "done"
    finally:
        pool.shutdown(wait=False)


ASKED: dict[str, Callable[[Service], Any]] = {
    "pause": lambda service: service.pause(),
    "pause that waits": lambda service: service.pause(finish=True),
    "call": lambda service: service.call(lambda: 3),
    "submit": lambda service: started(service),
}


@pytest.mark.parametrize("name", ASKED)
@pytest.mark.parametrize("stopped", [False, True])
def test_who_asks_later_is_told(served: ServedModel, name: str, stopped: bool) -> None:
    service = served.service
    updates, ended = started(service)
    if stopped:
        service.stop()
    else:
        kill(service)
    assert ended.wait(WAIT)
    assert updates[-1].ending == ("interrupted" if stopped else "failed")
    error = outcome(lambda: ASKED[name](service))
    assert isinstance(error, DrainingError if stopped else N3CError)
    assert outcome(service.resume) == outcome(service.end_all) == outcome(service.stop) == "done"
    assert not service.healthy and service.waiting == 0


@pytest.mark.parametrize("name", ["pause that waits", "call"])
@pytest.mark.parametrize("stopped", [False, True])
def test_who_waits_already_is_told(served: ServedModel, name: str, stopped: bool) -> None:
    """One waits behind a round that does not end before the thread does."""
    service = served.service
    _, ended = started(service)
    entered, go_on = threading.Event(), threading.Event()

    def held() -> None:
        entered.set()
        go_on.wait(WAIT)

    pool = ThreadPoolExecutor(4)
    holding = pool.submit(service.call, held)
    assert entered.wait(WAIT)
    stopping = pool.submit(service.stop) if stopped else pool.submit(kill, service)
    while stopped and not service.draining:
        pass
    waiting = pool.submit(ASKED[name], service)
    go_on.set()
    result = waiting.exception(WAIT)
    # what was asked for before the thread died may have been done
    assert isinstance(result, (DrainingError if stopped else N3CError, type(None)))
    assert result is not None or stopped or name == "call"
    assert holding.exception(WAIT) is stopping.exception(WAIT) is None and ended.wait(WAIT)
    pool.shutdown()


def test_a_pause_that_waits_lets_what_is_paused_finish(served: ServedModel) -> None:
    service = served.service
    _, ended = started(service, Options(max_new_tokens=30))
    while not service.scheduler.running:
        pass
    assert service.pause() and service.paused and not ended.is_set()
    assert service.pause(finish=True) and ended.is_set() and service.paused


def test_a_resume_ends_a_pause_that_waits(served: ServedModel) -> None:
    """Whoever asked for it may be gone: it must not come true later."""
    service = served.service
    _, ended = started(service)
    while not service.scheduler.running:
        pass
    pool = ThreadPoolExecutor(1)
    waiting = pool.submit(service.pause, finish=True)
    while service.scheduler.admits:
        pass
    service.resume()
    assert waiting.result(WAIT) is False and not service.paused and service.scheduler.admits
    service.end_all()
    assert ended.wait(WAIT)
    pool.shutdown()


def test_requests_are_told_and_health_says_so(served: ServedModel) -> None:
    client = TestClient(create_app(served))
    assert client.get("/health").status_code == 200
    answers: list[Any] = []
    bodies = [COMPLETION, COMPLETION | {"stream": True}, COMPLETION | {"n": 5}]

    def ask(body: dict[str, Any]) -> None:
        answers.append(client.post("/v1/completions", json=body))

    threads = [threading.Thread(target=ask, args=(body,)) for body in bodies]
    for thread in threads:
        thread.start()
    while len(served.service.scheduler.batch.rows) < 4:
        pass
    kill(served.service)
    for thread in threads:
        thread.join(WAIT)
    assert len(answers) == 3
    for answer in answers:
        streamed = answer.status_code == 200
        told = json.loads(answer.text.split("data: ")[-1]) if streamed else answer.json()
        assert "[DONE]" not in answer.text
        assert (told["error"]["code"], told["error"]["type"]) == ("E0845", "server_error")
        assert "the device is gone" in told["error"]["message"]
    assert (client.get("/health").status_code, client.get("/health").json()["error"]["code"]) == (503, "E0845")
    assert client.post("/v1/completions", json=COMPLETION).status_code == 500


def test_the_server_ends_with_the_engine(served: ServedModel) -> None:
    """So whoever started it can start it again."""
    server, ready, raised = (
        HttpServer(served, bound("127.0.0.1", 0), grace=60),
        threading.Event(),
        list[BaseException](),
    )

    def run() -> None:
        try:
            server.run(ready.set)
        except N3CError as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(WAIT)
    url = server.url
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    chunks = client.completions.create(model="small", prompt=[5, 6], max_tokens=4000, stream=True)
    next(chunks)
    kill(served.service)
    with pytest.raises(openai.APIError, match="the device is gone"):
        list(chunks)
    thread.join(WAIT)
    assert not thread.is_alive()
    (error,) = raised
    assert isinstance(error, N3CError) and error.exit_code == ExitCode.INTERNAL
    assert error.diagnostics[0].code == "E0845" and isinstance(error.__cause__, Fault)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


def test_a_request_that_cannot_begin_fails_alone(served: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = Running.begin

    def faulty(prompt: Any, *arguments: Any) -> Running:
        if prompt[0] == 7:
            raise RuntimeError("no grammar")
        return begin(prompt, *arguments)

    monkeypatch.setattr(Running, "begin", faulty)
    client = TestClient(create_app(served))
    answer = client.post("/v1/completions", json=COMPLETION | {"prompt": [7], "max_tokens": 2})
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "E0001")
    assert client.post("/v1/completions", json=COMPLETION | {"max_tokens": 2}).status_code == 200


def test_states_that_cannot_be_kept_fail_what_runs_and_not_the_server(served: ServedModel) -> None:
    """A client goes away, and the engine has no memory for the states of its sequence."""
    service, batch = served.service, served.service.scheduler.batch
    engine: Any = batch.engine
    snapshot = engine.snapshot
    ended = threading.Event()
    tickets = service.submit([Work((5, 6), ENDLESS)], lambda _, update: ended.set() if update.ending else None)

    def full(*_: Any) -> Any:
        raise MemoryError

    while not batch.rounds:
        pass
    engine.snapshot = full
    service.cancel(tickets)
    assert ended.wait(WAIT)
    engine.snapshot = snapshot
    client = TestClient(create_app(served))
    assert client.post("/v1/completions", json=COMPLETION | {"max_tokens": 2}).status_code == 200


def test_a_template_whose_process_does_not_start_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("n3c.runtime.serve.rendering.START_SECONDS", 0.0)
    renderer = Renderer(ChatTemplate("{{ messages }}", {}), 5.0, 1 << 30)
    with pytest.raises(N3CError, match="does not start: it takes longer than 0 seconds") as error:
        renderer.render([], {})
    assert error.value.exit_code == ExitCode.INTERNAL
    renderer.close()
