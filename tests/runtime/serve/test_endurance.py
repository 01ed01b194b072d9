"""Long runs, by `make test-slow`: nothing leaks, and the server keeps to its own description."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance

from n3c.runtime.serve.http_server import HttpServer
from support.serving_http import listening, scripted_served
from support.tokenizers import VOCAB

REQUESTS = 10_000
CHECKS = (HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large, HealthCheck.large_base_example)


@pytest.fixture(scope="module")
def server(built: Path) -> Iterator[HttpServer]:
    def model(tokens: Any) -> Any:
        logits = np.zeros(VOCAB, np.float32)
        logits[30 + (len(tokens) * 7 + int(tokens[-1])) % 90] = 9
        return logits

    with listening(scripted_served(built / "weights", model, context=200)) as running:
        yield running


def resident() -> int:
    """Return the memory of this process, bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_10000_requests_leave_rows_and_memory_as_before(server: HttpServer) -> None:
    """Whole answers, streams, streams that are left, refusals and schemas; memory is compared after a warm-up."""
    service, random = server.served.service, np.random.default_rng(0)
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [1, 2]}}}
    chat = {"model": "small", "messages": [{"role": "user", "content": "x"}], "max_tokens": 4}

    async def one(client: httpx.AsyncClient, kind: int) -> None:
        body: dict[str, Any] = {"model": "small", "prompt": random.integers(9, 90, 20).tolist(), "max_tokens": 4}
        if kind == 0:
            async with client.stream("POST", "/v1/completions", json=body | {"stream": True, "max_tokens": 90}) as told:
                async for _ in told.aiter_lines():
                    break
        elif kind == 1:
            plain = {"chat_template_kwargs": {"enable_thinking": False}}
            assert (await client.post("/v1/chat/completions", json=chat | plain | {"response_format": form})).is_success
        elif kind == 2:
            assert (await client.post("/v1/completions", json=body | {"n": 99})).status_code == 400
        else:
            answer = await client.post("/v1/completions", json=body | {"stream": kind == 3, "logprobs": 2})
            assert answer.status_code == 200

    async def ask(count: int) -> None:
        limits = httpx.Limits(max_connections=16)
        async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
            for begin in range(0, count, 100):
                await asyncio.gather(*(one(client, (begin + i) % 8) for i in range(min(100, count - begin))))

    def settled() -> tuple[int, int]:
        while not service.scheduler.idle:
            threading.Event().wait(0.01)
        gc.collect()
        return resident(), threading.active_count()

    asyncio.run(ask(1500))
    memory, threads = settled()
    asyncio.run(ask(REQUESTS))
    memory_after, threads_after = settled()
    print(f"{REQUESTS} requests: {memory / 1e6:.1f} MB before, {memory_after / 1e6:.1f} MB after")
    batch = service.scheduler.batch
    assert not batch.rows and service.waiting == 0 and threads_after <= threads
    assert batch.cache is not None and batch.cache.bytes <= batch.cache.memory
    assert memory_after - memory < 12e6


@pytest.mark.slow
def test_the_server_keeps_to_its_description(server: HttpServer) -> None:
    """Schemathesis makes right and wrong requests of the OpenAPI document; every answer is as described."""
    schema: Any = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    statuses: Counter[int] = Counter()

    def check(case: Any) -> None:
        if isinstance(case.body, dict) and "model" in case.body and statuses.total() % 2:
            case.body["model"] = "small"  # else nearly all are refused for their model
        answer = case.call(timeout=60)
        statuses[answer.status_code] += 1
        streamed = "event-stream" in "".join(answer.headers.get("content-type", []))
        checks = [not_a_server_error, content_type_conformance, *([] if streamed else [response_schema_conformance])]
        case.validate_response(answer, checks=checks)

    for operation in schema.get_all_operations():
        limits = settings(max_examples=40, deadline=None, suppress_health_check=CHECKS)
        limits(given(case=operation.ok().as_strategy())(check))()
    print(dict(statuses))
    assert statuses[200] > 5 and statuses[400] > 5
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert server.served.service.scheduler.idle
