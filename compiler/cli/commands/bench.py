"""n3c bench: measure an engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from n3c.compiler.cli import options
from n3c.compiler.cli.command import n3c_command
from n3c.compiler.cli.output import print_json, say, say_line
from n3c.compiler.cli.progress import TerminalProgress
from n3c.compiler.cli.table import format_table
from n3c.ir.diagnostics import ExitCode
from n3c.runtime import bench

if TYPE_CHECKING:
    from n3c.runtime.benchmark.result import Row

HEADER = (
    "batch",
    "context",
    "first token, ms",
    "token, ms: p50",
    "p90",
    "p99",
    "prompt tokens/s",
    "tokens/s",
    "a round",
)
PREDICTED = ("batch", "context", "GPU", "first token, ms", "token, ms")


@n3c_command(
    "bench",
    "Measure the time to the first token and of a token with BUILD, by context and batch.",
    examples=(
        ("every batch size of the spec, by ONNX Runtime on the CPU", "n3c bench build/my-model"),
        (
            "one, on a GPU, without plans",
            "n3c bench build/my-model --engine torch --device cuda --batch 1 --context 1024",
        ),
    ),
    groups={"What is measured": ("--batch", "--context", "--new-tokens", "--runs", "--seed")},
)
@options.of(bench)
@options.common
def command(build: Path, as_json: bool, **_: Any) -> int:
    """Measure BUILD."""
    with TerminalProgress() as progress:
        measured = bench(**options.given(bench), progress=progress)
    if as_json:
        print_json(measured.as_json())
    else:
        say(format_table(HEADER, [_row(row) for row in measured.rows]))
        if any(row.predicted for row in measured.rows):
            say("\npredicted for the plans of this build, kernels alone (docs/engine-forms.md)\n")
            say(format_table(PREDICTED, list(_predicted(measured.rows))))
        drafts = "with drafts" if measured.speculative else "without drafts"
        say_line(f"{measured.engine} on {measured.device} ({measured.device_name}), {drafts}; {measured.weights}")
    return ExitCode.OK


def _predicted(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    for row in rows:
        if row.predicted is not None:
            told = row.predicted
            first = "" if told.first_token is None else f"{told.first_token:.2f}"
            yield str(row.batch), str(row.context), told.gpu, first, f"{told.token:.3f}"


def _row(row: Row) -> tuple[str, ...]:
    first, token = row.time_to_first_token, row.time_per_token
    return (
        str(row.batch),
        str(row.context),
        f"{first.p50:.2f}",
        *(f"{value:.3f}" for value in (token.p50, token.p90, token.p99)),
        f"{row.prefill_tokens_per_second:,.0f}",
        f"{row.tokens_per_second:,.1f}",
        f"{row.acceptance_length:.2f}",
    )
