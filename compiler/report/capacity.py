"""`simulate`: what a service of many GPUs would do, by the scheduler of serving on a virtual clock."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from n3c.backends.gpus import GPUS, Gpu
from n3c.compiler.common_options import SET
from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError
from n3c.passes.serving import Served, serve
from n3c.runtime.options import Argument, Needs, Option, checked, size_of, usage_error
from n3c.runtime.predicted import audited_context, predicted_times
from n3c.specs.schema import Spec

from .memory_fit import RESERVED, memory_fits
from .subject import Subject, is_spec, open_subject

if TYPE_CHECKING:  # these load numpy
    from n3c.runtime.simulation.call_times import CallTimes
    from n3c.runtime.simulation.result import Load
    from n3c.runtime.simulation.service import Workload

CACHE_WITHOUT_GPU = 10**9
"""Bytes of kept prefixes where times were measured and nothing says what memory there is."""
MILLION = 10**6


@dataclass(frozen=True, slots=True)
class Simulated:
    """The result of `simulate`."""

    name: str
    gpu: Gpu | None
    """None where the times of calls were measured."""
    cards: int
    """GPUs of a replica."""
    replicas: int
    cache_memory: int | None
    """Bytes of a replica's kept prefixes; None: none are kept."""
    speculative: bool
    load: "Load"
    """Of a replica."""
    kept: bool | None
    """Whether the service level is kept; None where none was asked for."""

    @property
    def tokens_per_second(self) -> float:
        """Output tokens of the whole service."""
        return self.replicas * self.load.tokens_per_second

    @property
    def gpu_seconds(self) -> float:
        """GPU-seconds of a million output tokens: cards that idle count too."""
        return self.cards * MILLION / self.load.tokens_per_second

    @property
    def joules(self) -> float | None:
        """Joules of a million output tokens, at the power of the boards while they compute; None without a GPU."""
        return None if self.gpu is None else self.gpu.watts * self.gpu_seconds * self.load.busy

    def as_json(self) -> dict[str, Any]:
        """Return the form of `n3c simulate --json`."""
        return {
            "ok": self.kept is not False,
            "name": self.name,
            "gpu": None if self.gpu is None else self.gpu.name,
            "cards_a_replica": self.cards,
            "replicas": self.replicas,
            "cards": self.cards * self.replicas,
            "cache_memory_bytes": self.cache_memory,
            "speculative": self.speculative,
            "kept": self.kept,
            "tokens_per_second": round(self.tokens_per_second, 3),
            "requests_per_second": round(self.replicas * self.load.requests_per_second, 4),
            "gpu_seconds_per_million_tokens": round(self.gpu_seconds, 3),
            "joules_per_million_tokens": None if self.joules is None else round(self.joules, 1),
            "replica": self.load.as_json(),
            "diagnostics": [],
        }


RATED = Needs("rate")
LEVEL = "milliseconds that 99 of 100 requests keep: finds the fewest replicas."


@checked
def simulate(
    path: Annotated[Path | str | Spec, Argument("SPEC|BUILD")],
    *,
    gpu: Annotated[str | None, Option(f"The card: {', '.join(GPUS)}.", metavar="NAME")] = None,
    times: Annotated[Path | str | None, Option("Measured times of calls instead of a card's.", metavar="FILE")] = None,
    replicas: Annotated[int, Option("Servers of the model.", least=1, most=10**6)] = 1,
    cards: Annotated[int | None, Option("GPUs of a replica (default: as many as hold it).", least=1)] = None,
    rate: Annotated[float | None, Option("Requests a second, to all replicas together.", least=1e-6)] = None,
    prompt_tokens: Annotated[str, Option("Length of prompts.", metavar="DIST", needs=RATED)] = "512",
    output_tokens: Annotated[str, Option("Length of answers.", metavar="DIST", needs=RATED)] = "256",
    shared_tokens: Annotated[int, Option("Tokens with which all prompts begin.", least=0, needs=RATED)] = 0,
    trace: Annotated[
        Path | str | None, Option("Requests as JSON lines, in the form of Mooncake's traces.", metavar="FILE")
    ] = None,
    acceptance: Annotated[
        float | None, Option("Tokens a round with drafts, 1 to 1 + draft tokens; without it none are made.", least=1)
    ] = None,
    first_token: Annotated[float | None, Option(f"To the first token, {LEVEL}", metavar="MS", above=0)] = None,
    token: Annotated[float | None, Option(f"Of a token after it, {LEVEL}", metavar="MS", above=0)] = None,
    cache_memory: Annotated[
        int | str | None, Option("Of kept prefixes, a replica (default: what is free).", metavar="SIZE")
    ] = None,
    no_prefix_cache: Annotated[bool, Option("Keep no prefixes.")] = False,
    requests: Annotated[
        int, Option("Requests that are simulated, of some of the replicas.", least=20, most=10**6)
    ] = 500,
    seed: Annotated[int, Option("Of arrivals, lengths and drafts.", least=0)] = 0,
    set: Annotated[Sequence[str], replace(SET, needs=Needs("path", test=is_spec, said="a SPEC"))] = (),
) -> Simulated:
    """Say what a service of `replicas` does under a load, by serving's own batch and cache on a virtual clock.

    A card's times are those of the audit for a BUILD with plans, else of a kernel for each op. With `first_token` or
    `token` the fewest replicas are sought that keep them. N3CError: exit code 2 for options that do not go together, 3
    for a spec, 4 where a replica does not fit its cards, 6 for files.
    """
    if (gpu is None) == (times is None):
        raise usage_error("give one of --gpu NAME and --times FILE")
    if (rate is None) == (trace is None):
        raise usage_error("give one of --rate R and --trace FILE")
    if no_prefix_cache and cache_memory is not None:
        raise usage_error("--cache-memory has no effect beside --no-prefix-cache")
    card = None if gpu is None else _card(gpu)
    subject = open_subject(path, set)
    if subject.kind == "checkpoint":
        raise usage_error("give a SPEC or a BUILD (`n3c import` makes a SPEC of a checkpoint)")
    spec = subject.spec
    served = serve(spec)
    drafts = served.plan.draft_tokens
    if acceptance is not None and (spec.mtp is None or acceptance > 1 + drafts):
        most = "this model drafts nothing" if spec.mtp is None else f"a round has at most {1 + drafts} tokens"
        raise usage_error(f"--acceptance {acceptance:g}: {most}")

    from n3c.runtime.generation.capacity import Capacity
    from n3c.runtime.simulation.replica import Replica
    from n3c.runtime.simulation.service import Poisson, Service, ServiceLevel, Traced
    from n3c.runtime.simulation.workload import lengths_of

    number, free = _memory(spec, served, card, cards)
    memory = None if no_prefix_cache else free if cache_memory is None else size_of("--cache-memory", cache_memory)
    prompt, output = lengths_of("--prompt-tokens", prompt_tokens), lengths_of("--output-tokens", output_tokens)
    longest = Capacity.of(spec).context_length
    workload: Workload = (
        Traced(Path(trace), longest)
        if trace is not None
        else Poisson(rate or 0.0, prompt, output, shared_tokens, longest)
    )
    called = _times(subject, served, card, times, acceptance is not None)

    def make(drawn: int) -> Replica:
        return Replica.of(spec.serving, served.plan, called, acceptance=acceptance, cache_memory=memory, seed=drawn)

    service, level = Service(make, workload, requests, seed), ServiceLevel(first_token, token)
    kept: bool | None = None
    if first_token is None and token is None:
        load = service.load(replicas)
    else:
        needed = service.needed(level)
        kept = needed is not None
        replicas, load = needed or (replicas, service.load(replicas))
    if load is None:
        raise usage_error("too few requests come to a replica: fewer --replicas, or a longer --trace")
    return Simulated(spec.name, card, number, replicas, memory, acceptance is not None, load, kept)


def _card(name: str) -> Gpu:
    """Return the GPU of a name, whatever its case; N3CError (E0701, exit code 2) for none."""
    found = next((gpu for gpu in GPUS.values() if gpu.name.lower() == name.lower()), None)
    if found is None:
        raise usage_error(f"--gpu: {name!r} is none of {', '.join(GPUS)}")
    return found


def _memory(spec: Spec, served: Served, card: Gpu | None, cards: int | None) -> tuple[int, int]:
    """Return the cards of a replica, and the bytes on them that neither weights nor running requests take.

    N3CError (E0815, exit code 4) where `cards` do not hold it.
    """
    if card is None:
        return cards or 1, CACHE_WITHOUT_GPU
    capacity, batch = spec.serving.max_seq_len, max(spec.serving.batch_sizes)
    needed = memory_fits(spec, served, capacity, batch, [card])[0].gpus
    number = cards or needed
    if number < needed:
        message = f"{batch} requests of {capacity:,} tokens need {needed} x {card.name}, not {number}"
        help_ = "a smaller serving.max_seq_len or batch size, or more --cards"
        raise N3CError(Diagnostic("E0815", message, help=help_), ExitCode.TARGET)
    weights = sum(entry.bytes for entry in served.program.ledger)
    return number, number * (card.memory - RESERVED) - weights - batch * served.plan.bytes_at(capacity)


def _times(
    subject: Subject, served: Served, card: Gpu | None, times: Path | str | None, speculative: bool
) -> "CallTimes":
    from n3c.runtime.simulation.call_times import PlanTimes, read_times
    from n3c.runtime.simulation.kernel_times import KernelTimes

    if card is None:
        measured = read_times(Path(times or ""))
        entries = ("prefill", "draft", "verify") if speculative else ("prefill", "decode")
        measured.require(entries, subject.spec.serving.batch_sizes, Path(times or ""))
        return measured
    kernels = KernelTimes(served.program, card, subject.spec.model.vocab_size)
    if subject.kind != "build" or subject.place is None:
        return PlanTimes(kernels)
    audited = {
        entry: by_gpu[card.name].microseconds / MILLION
        for entry, by_gpu in predicted_times(subject.place).items()
        if card.name in by_gpu
    }
    return PlanTimes(kernels, audited, audited_context(subject.place)) if audited else PlanTimes(kernels)
