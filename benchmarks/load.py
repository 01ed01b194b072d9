"""`n3c serve` as clients see it: guidellm's streams against tiny on a CPU, with and without drafts and prefix cache.

guidellm is no dependency: it goes into an environment of its own, and its program onto PATH (or as GUIDELLM):

    python -m venv guidellm && guidellm/bin/pip install guidellm==0.8.1
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from . import demo

TITLE = "`n3c serve` under guidellm"

DEMO = demo.ROOT / "build" / "demo"
CLIENTS = (1, 4, 16, 64)
MODES = {
    ("no", "no"): ("--no-mtp", "--no-prefix-cache"),
    ("no", "yes"): ("--no-mtp",),
    ("yes", "no"): ("--no-prefix-cache",),
    ("yes", "yes"): (),
}
"""Drafts and prefix cache → options."""
PROMPT, COMMON, ANSWER = 256, 192, 32
"""Bytes of a prompt, those that all prompts begin with, and bytes of an answer: each is a token."""
COLUMNS = (
    "drafts", "cache", "clients", "requests/s", "tokens/s", "first token, ms: p50", "p90", "p99",
    "a token, ms: p50", "p90", "p99", "failed",
)  # fmt: skip


def run(quick: bool) -> Iterator[str]:
    """Yield the table."""
    program = shutil.which(os.environ.get("GUIDELLM", "guidellm"))
    if program is None:
        sys.exit(f"no guidellm on PATH: {__doc__}")
    requests, steps = (4, 3) if quick else (24, 90)
    weights = DEMO / "run" / "export"
    with TemporaryDirectory() as name:
        work = Path(name)
        demo.copy_text(work)
        demo.n3c("build", demo.SPEC, "--set", "serving.batch_sizes=[1, 4, 8]", "--target", "torch", "-o", work / "tiny")
        if not weights.is_dir():
            weights = _trained(work, steps)
        (work / "prompts.jsonl").write_text("\n".join(_prompts(demo.held_out(work))), encoding="utf-8")
        yield f"guidellm 0.8.1, {requests} requests and 4 a client for each row. Prompts of {PROMPT} bytes of Python,"
        yield f"{COMMON} of them the same in all; answers of {ANSWER} bytes, streamed; at most 8 run at a time.\n"
        yield f"| {' | '.join(COLUMNS)} |"
        yield f"|{'---|' * 2}{'---:|' * (len(COLUMNS) - 2)}"
        for mode, options in MODES.items():
            with _serving(work / "tiny", weights, *options) as url:
                for clients in CLIENTS:
                    yield _row(mode, clients, _measured(program, url, work, clients, requests + 4 * clients))


def _trained(work: Path, steps: int) -> Path:
    """Train tiny for a minute or two: drafts of random weights never stand."""
    train = work / "tiny" / "torch" / "train.py"
    data = ("--data", work / "text", "--out", work / "run", "--steps", steps, "--lr", 2e-3)
    demo.run(sys.executable, train, *data, capture=True)
    return work / "run" / "export"


def _prompts(text: bytes) -> Iterator[str]:
    random = np.random.default_rng(0)
    written = text.decode("ascii", errors="ignore")
    for _ in range(2000):
        at = int(random.integers(len(written) - PROMPT))
        prompt = written[:COMMON] + written[at : at + PROMPT - COMMON]
        yield json.dumps({"prompt": prompt, "prompt_tokens_count": PROMPT, "output_tokens_count": ANSWER})


@contextmanager
def _serving(build: Path, weights: Path, *options: str) -> Generator[str]:
    command = [str(demo.N3C), "serve", str(build), "--weights", str(weights), "--port", "0", "--json", *options]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        told = ""
        while not told.endswith("}\n") or told.count("{") != told.count("}"):
            line = server.stdout.readline()
            if not line:
                sys.exit("n3c serve does not start")
            told += line
        yield json.loads(told)["url"]
    finally:
        server.terminate()
        server.wait()


def _measured(program: str, url: str, work: Path, clients: int, requests: int) -> dict[str, Any]:
    """Run guidellm, and return its report."""
    report = work / "report.json"
    backend = f"kind=openai_http,target={url},model=tiny,request_format=/v1/completions,http2=false,max_tokens={ANSWER}"
    command = [
        program, "run", "--disable-console", "--backend", backend,
        "--profile", f"kind=concurrent,streams={clients}",
        "--constraint", f"kind=max_requests,count={requests}",
        "--data", f"kind=json_file,path={work / 'prompts.jsonl'}",
        "--output", f"kind=json,path={report}",
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    (measured,) = json.loads(report.read_text(encoding="utf-8"))["benchmarks"]
    return dict(measured)


def _row(mode: tuple[str, str], clients: int, measured: dict[str, Any]) -> str:
    metrics = measured["metrics"]
    rates = ("requests_per_second", "output_tokens_per_second")
    cells = [f"{metrics[name]['successful']['mean']:.1f}" for name in rates]
    for name in ("time_to_first_token_ms", "inter_token_latency_ms"):
        percentiles = metrics[name]["successful"]["percentiles"]
        cells += [f"{percentiles[key]:.1f}" for key in ("p50", "p90", "p99")]
    return f"| {' | '.join((*mode, str(clients), *cells, str(metrics['request_totals']['errored'])))} |"
