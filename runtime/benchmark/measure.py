"""Measuring an engine: requests of random prompts, timed from round to round."""

from __future__ import annotations

import time

import numpy as np

from n3c.runtime.engines.interface import Engine
from n3c.runtime.generation.capacity import Capacity
from n3c.runtime.generation.drafter import Drafter
from n3c.runtime.generation.loop import Generation
from n3c.runtime.generation.sequence import Options

from .result import Percentiles, Row

WARM_UP = 4
"""New tokens of the request before the measured ones: enough rounds that all kernels are compiled and recorded."""


def measure(
    engine: Engine, capacity: Capacity, drafter: Drafter | None, *, context: int, new_tokens: int, runs: int, seed: int
) -> Row:
    """Return the figures of `runs` requests of `engine.batch` prompts of `context` tokens.

    N3CError (exit code 2) where prompts and new tokens exceed the capacity.
    """
    random = np.random.default_rng(seed)
    prompts = random.integers(0, capacity.vocab_size, (engine.batch, context)).tolist()

    def request(tokens: int) -> Generation:
        return Generation(engine, prompts, Options(max_new_tokens=tokens), capacity, drafter=drafter)

    request(min(WARM_UP, new_tokens)).run()
    first, per_token = list[float](), list[float]()
    decoded, seconds, acceptance = 0, 0.0, list[float]()
    for _ in range(runs):
        generation, start = request(new_tokens), time.perf_counter()
        for index, pieces in enumerate(generation.steps()):
            now = time.perf_counter()
            if index == 0:
                first.append(now - start)
            elif pieces:
                sequences = len({piece.sequence for piece in pieces})
                per_token.append((now - start) * sequences / len(pieces))
            start = time.perf_counter()
        decoded += generation.statistics.decoded
        seconds += generation.statistics.decode_seconds
        acceptance.append(generation.statistics.acceptance_length)
    return Row(
        batch=engine.batch,
        context=context,
        time_to_first_token=Percentiles.of(first),
        time_per_token=Percentiles.of(per_token),
        prefill_tokens_per_second=engine.batch * context * runs / sum(first),
        tokens_per_second=decoded / seconds,
        acceptance_length=float(np.mean(acceptance)),
    )
