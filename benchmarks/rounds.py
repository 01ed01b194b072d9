"""What a round of eight sequences costs the host beside the engine: choosing tokens, text, scheduling, HTTP.

Times are processor time of a server's two threads: the engine's, on which a round runs, and the event loop's.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from safetensors.numpy import save_file

from n3c.compiler import build
from n3c.passes.lower.model import lower
from n3c.runtime.generation import sequence
from n3c.runtime.generation.distribution import Distribution
from n3c.runtime.generation.sequence import Running
from n3c.runtime.generation.text import GrowingText
from n3c.runtime.serve.http_server import HttpServer, bound
from n3c.runtime.serve.open import open_served
from n3c.runtime.serve.scheduler import Scheduler
from n3c.runtime.verification.random_weights import RandomCheckpoint
from n3c.specs.load import loaded
from n3c.specs.shipped import spec_file

TITLE = "A round of `n3c serve` on the host"

BATCH = 8
COLUMNS = ("drafts", "answers", "tokens", "engine", "choosing", "text", "scheduling", "HTTP", "host / engine")
CLIENT = """
import asyncio, json, sys
port, tokens, more = int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
async def one(i):
    body = json.dumps({"model": "tiny", "prompt": "import os" * (i + 1), "max_tokens": tokens, **more}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = ["POST /v1/completions HTTP/1.1", "Host: x", "Connection: close", f"Content-Length: {len(body)}", "", ""]
    writer.write("\\r\\n".join(head).encode() + body)
    answer = await reader.read()
    assert b" 200 " in answer[:20], answer
    writer.close()
async def main():
    await asyncio.gather(*(one(i) for i in range(8)))
asyncio.run(main())
"""
"""Eight requests at once, from a process of its own."""


class Stopwatch:
    """Adds up processor time within functions of the engine's thread, of each without those that it calls."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()
        self._running: list[float] = []

    def timing(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function`, timed."""

        @wraps(function)
        def timed(*arguments: Any, **named: Any) -> Any:
            start = time.thread_time()
            self._running.append(0.0)
            try:
                return function(*arguments, **named)
            finally:
                taken = time.thread_time() - start
                self.seconds[name] += taken - self._running.pop()
                self.calls[name] += 1
                if self._running:
                    self._running[-1] += taken

        return timed


def run(quick: bool) -> Iterator[str]:
    """Yield the table: milliseconds a round."""
    tokens = 24 if quick else 200
    torch.set_num_threads(1)
    yield f"Tiny by PyTorch on one thread, eight requests at once of {tokens} new tokens each, temperature 1;"
    yield "milliseconds of processor time a round. Scheduling is the rest of the engine's thread.\n"
    yield f"| {' | '.join(COLUMNS)} |"
    yield f"|{'---|' * 2}{'---:|' * (len(COLUMNS) - 2)}"
    spec, _ = loaded(spec_file("tiny"), ())
    with TemporaryDirectory() as name:
        work = Path(name)
        random = RandomCheckpoint(lower(spec), 0)
        (work / "weights").mkdir()
        save_file({name: random.read(name).astype(np.float32) for name in random}, work / "weights/model.safetensors")
        build("tiny", target="torch", output=work / "tiny", set=(f"serving.batch_sizes=[{BATCH}]",))
        for drafts in (False, True):
            for answers, more in (("whole", "{}"), ("streamed", '{"stream": true}')):
                yield _measured(work, drafts, answers, more, tokens)


def _measured(work: Path, drafts: bool, answers: str, more: str, tokens: int) -> str:
    watch = Stopwatch()
    served = open_served(work / "tiny", work / "weights", engine="torch", no_mtp=not drafts, no_prefix_cache=True)
    engine: Any = served.service.scheduler.batch.engine
    engine.run = watch.timing("engine", engine.run)
    with ExitStack() as patches:
        for owner, name, part in (
            (Running, "choice", "choosing"),
            (Distribution, "draw", "choosing"),
            (sequence, "token_logprobs", "choosing"),
            (GrowingText, "feed", "text"),
            (Scheduler, "step", "scheduling"),
        ):
            patches.enter_context(patch.object(owner, name, watch.timing(part, getattr(owner, name))))
        server, ready = HttpServer(served, bound("127.0.0.1", 0), grace=5), threading.Event()
        thread = threading.Thread(target=server.run, args=(ready.set,))
        thread.start()
        ready.wait()
        assert thread.ident is not None
        clock = time.pthread_getcpuclockid(thread.ident)
        port = str(server.socket.getsockname()[1])
        client = [sys.executable, "-c", CLIENT, port, str(tokens), more]
        subprocess.run(client, check=True)  # warms up
        watch.seconds.clear()
        watch.calls.clear()
        before, decoded = time.clock_gettime(clock), served.service.scheduler.batch.decoded
        subprocess.run(client, check=True)
        http = time.clock_gettime(clock) - before
        decoded = served.service.scheduler.batch.decoded - decoded
        server.end()
        thread.join()
    rounds = watch.calls["scheduling"]
    times = [1e3 * watch.seconds[part] / rounds for part in ("engine", "choosing", "text", "scheduling")]
    times.append(1e3 * http / rounds)
    cells = [f"{decoded / rounds:.1f}", *(f"{each:.2f}" for each in times), f"{sum(times[1:]) / times[0]:.2f}"]
    return f"| {'yes' if drafts else 'no'} | {answers} | {' | '.join(cells)} |"
