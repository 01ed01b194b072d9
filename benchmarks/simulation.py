"""`n3c simulate` beside the engine that it stands for.

The engine runs on one thread and its clock is that thread's processor time, so that other work on the machine counts in
neither; requests come by this clock. The simulation knows the times of the engine's calls, measured beforehand, how
long prompts and answers are, and how many drafts stood; scheduling, cache and speculation are the very same code.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from n3c.passes.lower.model import lower
from n3c.passes.serving import Served, serve
from n3c.runtime.engines.interface import Engine
from n3c.runtime.engines.torch.open import torch_engine
from n3c.runtime.engines.torch.weights import CheckpointWeights
from n3c.runtime.generation.batch import Batch
from n3c.runtime.generation.capacity import Capacity
from n3c.runtime.generation.drafter import MtpDrafter
from n3c.runtime.generation.prefix_cache import PrefixCache
from n3c.runtime.simulation.call_times import MeasuredTimes
from n3c.runtime.simulation.measure import TimedEngine, measure
from n3c.runtime.simulation.replica import Replica
from n3c.runtime.simulation.result import Load, load_of
from n3c.runtime.simulation.workload import Request, lengths_of, poisson
from n3c.runtime.verification.random_weights import RandomCheckpoint
from n3c.specs.load import loaded
from n3c.specs.schema import Spec
from n3c.specs.shipped import spec_file

from .clock import SkippingClock

TITLE = "`n3c simulate` beside an engine"
CHECKED = ("rate", "drafts", "times of calls", "tokens/s", "first token: p50", "p90", "a token: p50", "p90", "found")
SEEDS = 6
"""Runs of a row, each of other requests."""
MEMORY = 10**8
SIZES = (1, 2, 4)


def run(quick: bool) -> Iterator[str]:
    """Yield simulated over measured figures, with the times of calls known from elsewhere and from the run itself."""
    requests, seeds = (40, 2) if quick else (120, SEEDS)
    torch.set_num_threads(1)
    spec, _ = loaded(spec_file("tiny"), ("serving.batch_sizes=[1, 2, 4]",))
    yield (
        f"\n{spec.name}, the PyTorch engine on one thread, {seeds} runs of {requests} requests a row: prompts of 90 to"
        " 200 tokens, 80 in common, 8 to 60 new tokens. Simulated over measured, the mean of the runs and half of"
        " the width of its 95 % confidence interval.\n"
    )
    yield f"| {' | '.join(CHECKED)} |"
    yield f"|{'---:|' * len(CHECKED)}"
    for drafts in (False, True):
        server = _Server.of(spec, drafts)
        for share in (0.4, 0.8):
            rate = share * server.most_requests()
            runs = [server.compared(rate, requests, seed) for seed in range(1, seeds + 1)]
            for number, name in enumerate(("before and after the run", "in the run")):
                cells = [_with_interval(column) for column in zip(*(run[number] for run in runs), strict=True)]
                yield f"| {rate:.2f} | {'yes' if drafts else 'no'} | {name} | {' | '.join(cells)} |"


@dataclass
class _Server:
    """The PyTorch engine under the batch and cache of serving."""

    spec: Spec
    served: Served
    drafts: bool
    engine: Engine
    before: MeasuredTimes
    """The newest times that were measured of the engine alone."""

    @staticmethod
    def of(spec: Spec, drafts: bool) -> _Server:
        served = serve(spec)
        names = ("prefill", "draft", "verify") if drafts else ("prefill", "decode")
        engine = torch_engine(served, spec, names, SIZES, CheckpointWeights(RandomCheckpoint(lower(spec), 0)))
        return _Server(spec, served, drafts, engine, measure(engine, spec, clock=time.thread_time))

    def most_requests(self) -> float:
        """Return the requests a second that four at once would be answered at, of 34 tokens and two chunks each."""
        call = self.before.call
        a_round = call("verify", 4, 200) + 2 * call("draft", 4, 200) if self.drafts else call("decode", 4, 200)
        return 1 / (34 * a_round / 4 + 2 * call("prefill", 1, 200))

    def compared(self, rate: float, requests: int, seed: int) -> tuple[list[float], list[float]]:
        """Return simulated figures over those of a run: with the times of calls around it, and with those in it."""
        prompt, output = lengths_of("", "uniform:90,200"), lengths_of("", "uniform:8,60")
        given = [_real(r) for r in poisson(rate, requests, prompt, output, 80, np.random.default_rng(seed))]
        engine: Any = TimedEngine(self.engine, time.thread_time)
        drafter = MtpDrafter() if self.drafts else None
        batch = Batch(engine, Capacity.of(self.spec), drafter, PrefixCache(MEMORY, self.drafts))
        clock: Any = SkippingClock(time.thread_time)
        real = Replica(batch, clock, partial(getattr, clock, "now"))
        begin = time.thread_time()
        real.run(given)
        others = time.thread_time() - begin - engine.seconds
        measured = load_of([real])
        assert measured is not None
        drawn = sum(each.tokens for each in real.answered) + (2 * batch.rounds if self.drafts else 0)
        within: MeasuredTimes = engine.times(others / drawn)
        # other work on the machine slows calls down, in turns: those before and after the run count
        around = _mean(self.before, after := measure(self.engine, self.spec, clock=time.thread_time))
        self.before = after
        within = replace(within, calls={**around.calls, **within.calls})
        acceptance = measured.acceptance_length if self.drafts else None
        return self._ratios(around, acceptance, given, measured), self._ratios(within, acceptance, given, measured)

    def _ratios(
        self, times: MeasuredTimes, acceptance: float | None, given: Sequence[Request], measured: Load
    ) -> list[float]:
        serving = replace(self.spec.serving, batch_sizes=SIZES)
        paper = Replica.of(serving, self.served.plan, times, acceptance=acceptance, cache_memory=MEMORY)
        paper.run(given)
        said = load_of([paper])
        assert said is not None
        return [a / b for a, b in zip(_figures(said), _figures(measured), strict=True)]


def _mean(one: MeasuredTimes, other: MeasuredTimes) -> MeasuredTimes:
    calls = {
        name: tuple(
            (context, (seconds + more) / 2)
            for (context, seconds), (_, more) in zip(points, other.calls[name], strict=True)
        )
        for name, points in one.calls.items()
    }
    draw = (one.draw_seconds + other.draw_seconds) / 2
    return MeasuredTimes(calls, draw, (one.copy_bytes_per_second + other.copy_bytes_per_second) / 2)


def _real(request: Request) -> Request:
    """Return a request with tokens of a vocabulary of bytes: what prompts have in common stays."""
    return replace(request, prompt=tuple((token * 2654435761 >> 7) % 251 for token in request.prompt))


def _figures(load: Load) -> list[float]:
    first, token = load.first_token, load.token
    return [load.tokens_per_second, first.p50, first.p90, token.p50, token.p90, load.found]


def _with_interval(values: Sequence[float]) -> str:
    """Return the mean of ratios, and the half width of its interval by Student's t distribution."""
    if len(values) < 2:
        return f"{values[0]:.2f}"
    half = T_975[len(values) - 1] * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return f"{np.mean(values):.2f} ± {half:.2f}"


T_975 = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365}
"""Degrees of freedom → the quantile of Student's t distribution."""
