"""Many requests of every kind: what a server holds afterwards is what it held before."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from n3c.runtime.generation.sequence import Running
from n3c.runtime.serve.exchange import Exchange
from n3c.runtime.serve.http_server import HttpServer
from n3c.runtime.serve.rendering import Renderer
from n3c.runtime.serve.scheduler import Ticket
from support.serving_http import guarded, listening, small_served

CACHE_BYTES = 4_000_000
FORM = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [1, 2]}}}
CHAT: dict[str, Any] = {
    "model": "small",
    "messages": [{"role": "user", "content": "x"}],
    "max_tokens": 4,
    "chat_template_kwargs": {"enable_thinking": False},
}


@pytest.fixture
def server(built: Path) -> Iterator[HttpServer]:
    served = small_served(built, cache_memory=str(CACHE_BYTES))
    assert served.renderer is not None
    patient = Renderer(served.renderer.template, seconds=60, memory=1 << 30)  # a busy machine takes more than 5 seconds
    with listening(guarded(served, renderer=patient)) as running:
        yield running


@dataclass(frozen=True)
class Held:
    """What this process, of server and client, holds when nothing runs."""

    memory: int
    """Resident, bytes."""
    threads: int
    """But those of the event loop's pool, which come when they are needed and stay."""
    files: int
    requests: Counter[str]
    """Objects of a request that are alive."""


def held(server: HttpServer) -> Held:
    service, waiting = server.served.service, threading.Event()
    for _ in range(3000):
        if service.scheduler.idle and not server.connections and not service.waiting:
            break
        waiting.wait(0.01)
    service.call(lambda: None)  # whatever the last round left in the thread's variables is gone
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    kinds = (Ticket, Running, Exchange)
    alive = Counter(type(each).__name__ for each in gc.get_objects() if type(each) in kinds)
    files = sum(1 for _ in Path("/proc/self/fd").iterdir())
    threads = sum(not thread.name.startswith("asyncio_") for thread in threading.enumerate())
    return Held(pages * os.sysconf("SC_PAGE_SIZE"), threads, files, alive)


async def ask(url: str, count: int, seed: int) -> Counter[int]:
    """Ask many times, 16 at once: whole answers, streams, streams that are left, refusals, schemas, prefixes."""
    random = np.random.default_rng(seed)
    statuses: Counter[int] = Counter()

    async def one(client: httpx.AsyncClient, kind: int) -> int:
        body: dict[str, Any] = {"model": "small", "prompt": random.integers(9, 90, 20).tolist(), "max_tokens": 4}
        match kind:
            case 0:
                body |= {"stream": True, "max_tokens": 90}
                async with client.stream("POST", "/v1/completions", json=body) as told:
                    async for _ in told.aiter_lines():
                        break
                return told.status_code
            case 1:
                return (await client.post("/v1/chat/completions", json=CHAT | {"response_format": FORM})).status_code
            case 2:
                return (await client.post("/v1/completions", json=body | {"n": 99})).status_code
            case 3:
                return (await client.post("/v1/completions", content=b"{")).status_code
            case _:
                more = {"stream": kind == 4, "logprobs": 2, "n": 1 + kind % 2, "stop": ["zz"]}
                return (await client.post("/v1/completions", json=body | more)).status_code

    # a connection each: one that is kept may be closed as idle while the next request is on its way
    limits = httpx.Limits(max_connections=16, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        for begin in range(0, count, 100):
            asked = (one(client, i % 8) for i in range(begin, min(begin + 100, count)))
            statuses.update(await asyncio.gather(*asked))
    return statuses


def run(server: HttpServer, warm: int, count: int) -> tuple[Held, Held]:
    """Return what is held before and after so many requests."""
    asyncio.run(ask(server.url, warm, 0))
    before = held(server)
    statuses = asyncio.run(ask(server.url, count, 1))
    assert set(statuses) == {200, 400} and statuses[400] == 2 * (count // 8) + min(2, max(0, count % 8 - 2))
    return before, held(server)


def require_as_before(server: HttpServer, before: Held, after: Held) -> None:
    batch = server.served.service.scheduler.batch
    assert not batch.rows and not server.served.service.scheduler.running
    assert after.requests == before.requests
    assert after.threads <= before.threads and after.files <= before.files  # fewer where an earlier test's went
    assert batch.cache is not None and batch.cache.bytes <= CACHE_BYTES


def test_300_requests_leave_nothing(server: HttpServer) -> None:
    require_as_before(server, *run(server, 16, 300))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_10000_requests_leave_memory_as_before(server: HttpServer) -> None:
    before, after = run(server, 1000, 10_000)
    megabytes = [f"{each.memory / 1e6:.1f} MB, {each.threads} threads, {each.files} files" for each in (before, after)]
    print(f"before {megabytes[0]}; after {megabytes[1]}")
    require_as_before(server, before, after)
    assert after.memory - before.memory < 10e6
