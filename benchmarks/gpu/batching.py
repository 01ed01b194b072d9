"""Requests that come and go on whole Nano in NVFP4: the scheduler of `n3c serve` alone, beside `n3c simulate`.

Prompts and answers have lengths like a chat's, and come by chance at 1.2, 0.8 and 0.4 of about the most that the engine
can answer. The simulation knows the times of the engine's calls, measured beforehand.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from n3c.passes.serving import serve
from n3c.runtime.generation.batch import Batch
from n3c.runtime.generation.capacity import Capacity
from n3c.runtime.generation.prefix_cache import PrefixCache
from n3c.runtime.simulation.measure import measure
from n3c.runtime.simulation.replica import Replica
from n3c.runtime.simulation.result import Load, load_of
from n3c.runtime.simulation.workload import Request, lengths_of, poisson

from ..clock import SkippingClock
from .part import Row, Setting, report, spec_of
from .served import engine_of

TITLE = "Continuous batching"


def run(setting: Setting) -> Iterator[Row]:
    """Yield what calls take, then what clients see at each rate, measured and simulated."""
    sizes, requests, memory = ([1, 2], 12, 10**7) if setting.tiny else ([1, 8, 32], 128, 2 * 10**9)
    prompt, output = ("uniform:20,60", "uniform:4,12") if setting.tiny else ("uniform:200,800", "uniform:32,160")
    serving = {
        "serving.max_seq_len": 128 if setting.tiny else 2048,
        "serving.prefill_chunk": 32 if setting.tiny else 512,
    }
    spec = spec_of("nano", setting, {**serving, "serving.batch_sizes": sizes})
    engine = engine_of(spec, setting, ("prefill", "decode"), sizes)
    times = measure(engine, spec, repeats=3)
    yield {"call": "drawing, a token", "ms": round(1e3 * times.draw_seconds, 3)}
    for name, points in times.calls.items():
        yield {"call": name, "ms": ", ".join(f"{1e3 * seconds:.2f} at {context}" for context, seconds in points)}
    lengths, plan = (lengths_of("", prompt), lengths_of("", output)), serve(spec).plan

    def measured(given: Sequence[Request]) -> Load | None:
        batch = Batch(engine, Capacity.of(spec), cache=PrefixCache(memory, False))
        clock: Any = SkippingClock(time.perf_counter)
        replica = Replica(batch, clock, partial(getattr, clock, "now"))
        replica.run(given)
        return load_of([replica])

    def simulated(given: Sequence[Request]) -> Load | None:
        replica = Replica.of(spec.serving, plan, times, acceptance=None, cache_memory=memory)
        replica.run(given)
        return load_of([replica])

    def drawn(rate: float) -> list[Request]:
        given = poisson(rate, requests, *lengths, 16, np.random.default_rng(0))
        return [
            replace(r, prompt=tuple(token * 2654435761 % spec.model.vocab_size for token in r.prompt)) for r in given
        ]

    def call(entry: str, rows: int) -> float:
        return times.calls[f"{entry}.b{rows}"][0][1] / rows

    answer = float(np.mean([request.output_tokens for request in drawn(1.0)]))
    most = 1 / (answer * call("decode", max(sizes)) + call("prefill", 1))
    measured(drawn(2 * most)[: 2 * max(sizes)])  # compiles, and records the graphs
    for share in (0.4,) if setting.tiny else (1.2, 0.8, 0.4):
        rate = share * most
        for how, load in (("measured", measured(drawn(rate))), ("simulated", simulated(drawn(rate)))):
            if load is None:  # too few requests
                continue
            yield {
                "requests a second": f"{rate:.3g}",
                "": how,
                "tokens/s": round(load.tokens_per_second, 1),
                "running": round(load.running, 1),
                "first token ms: p50": round(load.first_token.p50, 1),
                "p90": round(load.first_token.p90, 1),
                "a token ms: p50": round(load.token.p50, 2),
                "its p90": round(load.token.p90, 2),
            }


if __name__ == "__main__":
    report(run)
