"""What `n3c simulate` says of services that nobody has here: models on cards, drafts by batch and context, a day."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass

from n3c.backends.gpus import GPUS
from n3c.compiler import simulate
from n3c.compiler.report.capacity import Simulated
from n3c.passes.serving import serve
from n3c.runtime.simulation.kernel_times import KernelTimes
from n3c.specs.load import loaded
from n3c.specs.shipped import spec_file

TITLE = "Services on paper"
MODELS = ("nano", "super", "ultra")
CARDS = ("RTX PRO 6000", "H200 SXM", "B200")
CONTEXTS = (8_192, 131_072, 1_048_576)
ACCEPTED = 3.45
"""Tokens of a round of three drafts."""
SETTINGS = ("serving.batch_sizes=[1, 8, 16, 32]", "serving.prefill_chunk=1024", "serving.max_seq_len=16384")
PROMPTS, ANSWERS = "lognormal:1000,8000", "exponential:400"
DAY = 86_400
"""Seconds."""
SERVICE = (
    *("model", "card", "drafts", "cards a replica", "replicas", "cards", "tokens/s"),
    *("first token, s: p50", "p99", "a token, ms: p50", "p99", "GPU-seconds a M tokens", "kJ a M tokens"),
)
ROUND = (
    *("model", "card", "batch"),
    *(f"{what} at {context:,}" for what in ("a token, ms,", "with drafts, ms,", "pays from") for context in CONTEXTS),
)


def run(quick: bool) -> Iterator[str]:
    """Yield what services take, whether drafts pay, and how long a day is simulated; if `quick` of one model only."""
    yield (
        f"\n100 requests a second, prompts {PROMPTS}, answers {ANSWERS}; 99 of 100 get their first token in 5 s and"
        f" further ones in 100 ms. {', '.join(SETTINGS)}. Three drafts, of which a round gives {ACCEPTED}.\n"
    )
    yield from _head(SERVICE, 3)
    for name, card in itertools.product(MODELS[: 1 if quick else 3], CARDS):
        for drafts in (False, True) if name != "nano" else (False,):
            yield _service(name, card, drafts)
    yield f"\nA token without drafts, one of a round that gives {ACCEPTED}, and how many a round must give to pay.\n"
    yield from _head(ROUND, 2)
    for name, card in itertools.product(MODELS[1:], CARDS[: 1 if quick else 3]):
        yield from _rounds(name, card)
    if not quick:
        yield from _days()


def _head(columns: tuple[str, ...], words: int) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield f"|{'---|' * words}{'---:|' * (len(columns) - words)}"


def _service(name: str, card: str, drafts: bool) -> str:
    done = simulate(
        name, gpu=card, rate=100.0, prompt_tokens=PROMPTS, output_tokens=ANSWERS,
        acceptance=ACCEPTED if drafts else None, first_token=5000, token=100, requests=500, set=SETTINGS,
    )  # fmt: skip
    start = f"| {name} | {card} | {'yes' if drafts else 'no'} | {done.cards}"
    if not done.kept:
        return f"{start} | none keeps it |{' |' * (len(SERVICE) - 5)}"
    load = done.load
    cells = (
        f"{done.replicas} | {done.cards * done.replicas:,} | {done.tokens_per_second:,.0f}",
        f"{load.first_token.p50 / 1000:.2f} | {load.first_token.p99 / 1000:.2f}",
        f"{load.token.p50:.1f} | {load.token.p99:.1f} | {done.gpu_seconds:,.0f} | {(done.joules or 0) / 1000:,.0f}",
    )
    return f"{start} | {' | '.join(cells)} |"


@dataclass(frozen=True, slots=True)
class _Round:
    """Seconds of a token without drafts, and of a round of three."""

    token: float
    drafted: float

    @staticmethod
    def of(kernels: KernelTimes, batch: int, context: int) -> _Round:
        token = kernels.call("decode", batch, context) + batch * kernels.draw()
        drafted = 3 * kernels.call("draft", batch, context) + kernels.call("verify", batch, context)
        return _Round(token, drafted + batch * (3 + ACCEPTED) * kernels.draw())


def _rounds(name: str, card: str) -> Iterator[str]:
    spec, _ = loaded(spec_file(name), ("serving.max_seq_len=1048576",))
    kernels = KernelTimes(serve(spec).program, GPUS[card], spec.model.vocab_size)
    for batch in (1, 8, 32):
        rounds = [_Round.of(kernels, batch, context) for context in CONTEXTS]
        cells = [f"{each.token * 1e3:.1f}" for each in rounds]
        cells += [f"{each.drafted / ACCEPTED * 1e3:.1f}" for each in rounds]
        cells += [f"{each.drafted / each.token:.2f}" for each in rounds]
        yield f"| {name} | {card} | {batch} | {' | '.join(cells)} |"


def _days() -> Iterator[str]:
    """Yield how long a day of a thousand cards takes to simulate: that of one replica, which stands for all."""
    yield "\nA day of 1,000 B200, by the requests of one replica:\n"
    for name, rate, acceptance in (("nano", 1000.0, None), ("super", 300.0, ACCEPTED)):
        start = time.process_time()
        done: Simulated = simulate(
            name, gpu="B200", replicas=1000, rate=rate, prompt_tokens=PROMPTS, output_tokens=ANSWERS,
            acceptance=acceptance, requests=int(DAY * rate / 1000), set=(*SETTINGS, "serving.max_seq_len=131072"),
        )  # fmt: skip
        seconds, load = time.process_time() - start, done.load
        yield (
            f"- {name}: {load.requests:,} requests, {load.requests * load.output_tokens:,.0f} tokens in"
            f" {seconds:,.0f} s of a processor; first token {load.first_token.p50:.0f} ms (p50),"
            f" {load.first_token.p99:.0f} ms (p99), a token {load.token.p50:.1f} and {load.token.p99:.1f} ms"
        )
