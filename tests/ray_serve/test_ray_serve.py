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
pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Two replicas of a small byte-level model."""
    import ray
    from ray import serve

    from n3c.compiler import build
    from n3c.runtime.serve.ray_application import application
    from support.checkpoints import write_checkpoint
    from support.specs import SMALL, spec_from_text

    folder = tmp_path_factory.mktemp("ray")
    text = SMALL.replace('"MEM*E-ME"', '"M*E"').replace("vocab_size = 97", "vocab_size = 256")
    text = text.replace(
        "max_seq_len = 32", "batch_sizes = [1, 4]\nmax_seq_len = 64\nprefill_chunk = 8\ndraft_tokens = 2"
    )
    (folder / "spec.toml").write_text(text.lstrip())
    write_checkpoint(folder / "weights", spec_from_text(text), shards=1)
    (folder / "weights" / "tokenizer.json").unlink()
    build(folder / "spec.toml", target="torch", output=folder / "out")
    os.environ["N3C_TEST_MARK"] = MARK
    ray.init(num_cpus=4, include_dashboard=False, logging_level="error")
    serve.start(http_options={"port": 18765})
    options: dict[str, Any] = {
        "build": str(folder / "out"),
        "weights": str(folder / "weights"),
        "name": "small",
        "engine": "torch",
    }
    serve.run(application(replicas=2, actor_options={"num_cpus": 0.5}, **options))
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


def test_requests_of_one_beginning_find_it_in_the_cache(url: str) -> None:
    prompt = "the same beginning of many requests, "
    answers = [completed(url, prompt) for _ in range(8)]
    cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers]
    assert cached[0] == 0 and all(found >= 32 for found in cached[1:])
    with urllib.request.urlopen(f"{url}/health", timeout=30) as health:
        assert health.status == 200


def test_a_replica_is_killed_under_load_and_every_request_is_answered(url: str) -> None:
    expected = {i: completed(url, f"{i} prompt")["choices"][0]["text"] for i in range(6)}
    before, failed, answered = pids(), list[str](), list[int]()
    assert len(before) == 2

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
    for thread in clients:
        thread.join()
    assert failed == [] and len(answered) == 96
    deadline = time.monotonic() + 120
    while len(pids() - {killed}) < 2 and time.monotonic() < deadline:
        time.sleep(0.5)
    assert len(pids() - {killed}) == 2, "a new replica takes the place"
