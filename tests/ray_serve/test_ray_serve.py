"""Ray Serve on this machine: `make test-ray`, in an environment that has ray[serve]."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

MARK = f"n3c-{uuid.uuid4().hex}"
PATIENCE = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "55", "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60"}
"""Seconds for Ray's proxy to start and to answer, on a machine that does other things too."""
TOKENS = 1_500
"""Of a stream that is still there when its replica is killed."""
pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Two replicas of a small byte-level model."""
    os.environ |= {"N3C_TEST_MARK": MARK, **PATIENCE}  # Ray reads them when it is imported
    import ray
    from ray import serve

    from n3c.compiler import build
    from n3c.runtime.serve.ray_application import application
    from support.checkpoints import write_checkpoint
    from support.specs import SMALL, spec_from_text

    folder = tmp_path_factory.mktemp("ray")
    text = SMALL.replace('"MEM*E-ME"', '"M*E"').replace("vocab_size = 97", "vocab_size = 256")
    text = text.replace("max_position_embeddings = 64", "max_position_embeddings = 4096")
    text = text.replace(
        "max_seq_len = 32", f"batch_sizes = [1, 4]\nmax_seq_len = {TOKENS + 64}\nprefill_chunk = 8\ndraft_tokens = 2"
    )
    (folder / "spec.toml").write_text(text.lstrip())
    write_checkpoint(folder / "weights", spec_from_text(text), shards=1)
    (folder / "weights" / "tokenizer.json").unlink()
    build(folder / "spec.toml", target="torch", output=folder / "out")
    ray.init(num_cpus=2, include_dashboard=False, logging_level="error")
    serve.start(http_options={"port": 18765})
    options: dict[str, Any] = {
        "build": str(folder / "out"),
        "weights": str(folder / "weights"),
        "name": "small",
        "engine": "torch",
    }
    serve.run(application(replicas=2, actor_options={"num_cpus": 0.4}, **options))
    yield "http://127.0.0.1:18765"
    serve.shutdown()
    ray.shutdown()


def completed(url: str, prompt: str, **more: Any) -> dict[str, Any]:
    body = json.dumps({"model": "small", "prompt": prompt, "max_tokens": 24, "temperature": 0, **more}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        data: dict[str, Any] = json.loads(answer.read())
    return data


def pids() -> set[int]:
    """Return the processes of the replicas, which have our mark in their environment."""
    found: set[int] = set()
    for folder in Path("/proc").iterdir():
        try:
            title, environment = ((folder / name).read_bytes() for name in ("cmdline", "environ"))
        except OSError:  # no process, one that has ended, or another user's
            continue
        if title.startswith(b"ray::ServeReplica:default:Replica") and MARK.encode() in environment:
            found.add(int(folder.name))
    return found


def busiest(replicas: set[int]) -> int:
    """Return the process that computes: the other one only tells that it is well."""

    def ticks(pid: int) -> int:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    before = {pid: ticks(pid) for pid in replicas}
    while True:
        time.sleep(0.05)
        least, most = sorted(replicas, key=lambda pid: ticks(pid) - before[pid])
        if ticks(most) - before[most] > 5 + 3 * (ticks(least) - before[least]):
            return most


def replaced(killed: int) -> set[int]:
    """Wait for a replica in the place of one that was killed; return both."""
    deadline = time.monotonic() + 240
    while len(found := pids() - {killed}) < 2:
        assert time.monotonic() < deadline, "no new replica takes the place"
        time.sleep(0.5)
    return found


def healthy(url: str) -> bool:
    with urllib.request.urlopen(f"{url}/health", timeout=60) as health:
        return bool(health.status == 200)


def test_requests_of_one_beginning_find_it_in_the_cache(url: str) -> None:
    prompt = "the same beginning of many requests, "
    answers = [completed(url, prompt) for _ in range(8)]
    cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers]
    assert cached[0] == 0 and all(found >= 32 for found in cached[1:])
    assert healthy(url)


def test_a_stream_whose_replica_is_killed_ends_with_an_error(url: str) -> None:
    """Nothing is sent twice; the same request is answered by the other replica."""
    body = {"model": "small", "prompt": "a long story", "max_tokens": TOKENS, "temperature": 0, "stream": True}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    before = replaced(0)
    with urllib.request.urlopen(request, timeout=120) as answer:
        events = (json.loads(line.removeprefix(b"data: ")) for line in answer if line.startswith(b"data: {"))
        seen = [next(events) for _ in range(9)]
        killed = busiest(before)
        os.kill(killed, signal.SIGKILL)
        seen += events
    *said, last = seen
    assert last["error"]["code"] == "replica_lost" and len(said) < TOKENS
    told, again = ("".join(event["choices"][0]["text"] for event in said), completed(url, "a long story"))
    assert told[:8] == again["choices"][0]["text"][:8] and len(told) > 8
    replaced(killed)


def test_a_replica_is_killed_under_load_and_every_request_is_answered(url: str) -> None:
    expected = {i: completed(url, f"{i} prompt")["choices"][0]["text"] for i in range(6)}
    before, failed, answered = replaced(0), list[str](), list[int]()

    def client(number: int) -> None:
        for turn in range(12):
            i = (number + turn) % 6
            try:
                assert completed(url, f"{i} prompt")["choices"][0]["text"] == expected[i]
                answered.append(i)
            except Exception as error:
                failed.append(repr(error))

    clients = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    for thread in clients:
        thread.start()
    while len(answered) < 10:
        time.sleep(0.02)
    killed = min(before)
    os.kill(killed, signal.SIGKILL)
    assert healthy(url), "the other replica answers"
    for thread in clients:
        thread.join()
    assert failed == [] and len(answered) == 96
    replaced(killed)
    assert healthy(url)
