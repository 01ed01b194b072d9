"""n3c simulate: what a service of many GPUs would do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from n3c.compiler import simulate
from n3c.compiler.cli import options
from n3c.compiler.cli.command import n3c_command
from n3c.compiler.cli.output import print_json, say, say_line
from n3c.compiler.cli.table import format_table
from n3c.compiler.report.capacity import Simulated
from n3c.compiler.report.units import format_bytes
from n3c.ir.diagnostics import ExitCode

TIMES = ("ms", "p50", "p90", "p99")


@n3c_command(
    "simulate",
    "Say what replicas of SPEC or BUILD do under a load, on a virtual clock.",
    examples=(
        ("one card", "n3c simulate nano --gpu 'RTX 5090' --rate 2 --output-tokens 256"),
        (
            "the fewest replicas that keep a service level",
            "n3c simulate super --gpu B200 --rate 100 --first-token 5000 --token 100",
        ),
    ),
    groups={
        "Machine": ("--gpu", "--times", "--replicas", "--cards"),
        "Load": (
            "--rate",
            "--prompt-tokens",
            "--output-tokens",
            "--shared-tokens",
            "--trace",
            "--acceptance",
            "--requests",
            "--seed",
        ),
        "Service level": ("--first-token", "--token"),
        "Prefix cache": ("--cache-memory", "--no-prefix-cache"),
    },
)
@options.of(simulate)
@options.common
def command(path: Path, as_json: bool, **_: Any) -> int:
    """Simulate a service."""
    result = simulate(**options.given(simulate))
    if as_json:
        print_json(result.as_json())
    else:
        load = result.load
        say(
            format_table(
                TIMES,
                [
                    ("to the first token", *(f"{value:,.1f}" for value in load.first_token.as_json().values())),
                    ("a token after it", *(f"{value:,.2f}" for value in load.token.as_json().values())),
                ],
            )
        )
        say("\n" + format_table(("", "the service", "a replica"), list(_figures(result))))
        if load.refused:
            say_line(f"\n{load.refused:,} requests are refused: their prompts are longer than the model's context")
        if load.saturated:
            say_line("\nmore requests come than are answered: the times grow with the number of requests")
        if result.kept is False:
            say_line("\nno number of replicas keeps the service level")
    return ExitCode.OK if result.kept is not False else ExitCode.TARGET


def _figures(result: Simulated) -> Iterator[tuple[str, str, str]]:
    load, cards = result.load, result.cards
    named = "" if result.gpu is None else f" {result.gpu.name}"
    yield "replicas", f"{result.replicas:,}", ""
    yield "cards", f"{result.replicas * cards:,}{named}", f"{cards}"
    yield "requests a second", f"{result.replicas * load.requests_per_second:,.2f}", f"{load.requests_per_second:,.3f}"
    yield "output tokens a second", f"{result.tokens_per_second:,.0f}", f"{load.tokens_per_second:,.1f}"
    yield "tokens a round", "", f"{load.acceptance_length:.2f}"
    yield "sequences at once", "", f"{load.running:.2f}"
    yield "computes, of the time", "", f"{load.busy:.0%}"
    kept = "" if result.cache_memory is None else format_bytes(result.cache_memory)
    yield "prompt tokens found in the cache", kept, f"{load.found:.1%}"
    yield "GPU-seconds a million tokens", f"{result.gpu_seconds:,.0f}", ""
    if result.joules is not None:
        yield "kJ a million tokens", f"{result.joules / 1000:,.0f}", ""
