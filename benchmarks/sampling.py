"""What drawing tokens costs the host in a round, beside transformers' logits processors and PyTorch's multinomial."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from n3c.runtime.engines.interface import Array
from n3c.runtime.generation.distribution import Distribution
from n3c.runtime.generation.sampling import Sampling, distribution
from n3c.runtime.generation.speculative import Draft, judge

TITLE = "Drawing tokens on the host"

VOCABULARY = 131_072
CASES = {
    "greedy": Sampling(),
    "temperature 1": Sampling(1.0),
    "top-k 50": Sampling(1.0, top_k=50),
    "top-p 0.95": Sampling(1.0, top_p=0.95),
}


def run(quick: bool) -> Iterator[str]:
    """Yield a table: milliseconds a round, and the ratio to the peer where that draws the same."""
    runs = 3 if quick else 15
    yield f"Vocabulary of {VOCABULARY:,}, float32 logits; median of {runs} interleaved rounds, milliseconds. Logits are"
    yield "peaked: normal, with 20 tokens about 14 above. A round with drafts draws 3 and judges them, all of which are"
    yield "likely to stand. Peer, at batch 1: transformers' processors, softmax and `torch.multinomial`, one thread.\n"
    yield "| sampling | b1 | peer, b1 | times the peer's | b8 with 3 drafts |"
    yield "|---|---:|---:|---:|---:|"
    logits = _logits()
    torch.set_num_threads(1)
    for name, sampling in CASES.items():
        ours, peer, drafted = _medians(
            runs,
            partial(_draw, logits[0, 0], sampling, np.random.default_rng(0)),
            _peer(logits[0, 0], sampling),
            partial(_speculate, logits, sampling, np.random.default_rng(0)),
        )
        yield f"| {name} | {1e3 * ours:.2f} | {1e3 * peer:.2f} | {ours / peer:.2f} | {1e3 * drafted:.1f} |"


def _logits() -> Array:
    """Return logits [8, 4, V]."""
    random = np.random.default_rng(0)
    logits = random.standard_normal((8, 4, VOCABULARY), np.float32)
    likely = random.integers(0, VOCABULARY, 20)
    logits[..., likely] += 12 + 5 * random.random(20, np.float32)
    return logits


def _draw(logits: Array, sampling: Sampling, generator: np.random.Generator) -> int:
    return distribution(logits, sampling).draw(generator)


def _speculate(logits: Array, sampling: Sampling, generator: np.random.Generator) -> None:
    for sequence in logits:
        drafts: list[Draft] = []
        for row in sequence[:-1]:
            proposed = distribution(row, sampling)
            drafts.append(Draft(proposed.draw(generator), proposed))
        judge(drafts, partial(_target, sequence, sampling), generator)


def _target(logits: Array, sampling: Sampling, place: int) -> Distribution:
    return distribution(logits[place], sampling)


def _peer(logits: Array, sampling: Sampling) -> Callable[[], object]:
    scores, ids = torch.from_numpy(logits)[None], torch.zeros(1, 1, dtype=torch.long)
    warpers: list[Any] = []
    if sampling.temperature == 0:
        return lambda: int(scores.argmax())
    warpers.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))

    def draw() -> int:
        warped = scores
        for warper in warpers:
            warped = warper(ids, warped)
        return int(torch.multinomial(warped.softmax(-1), 1))

    return draw


def _medians(runs: int, *works: Callable[[], object]) -> list[float]:
    rounds = [[_seconds(work) for work in works] for _ in range(runs + 1)][1:]
    return [statistics.median(times) for times in zip(*rounds, strict=True)]


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
