"""n3c quantize: a checkpoint in ModelOpt's layout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from n3c.compiler import quantize
from n3c.compiler.cli import options
from n3c.compiler.cli.output import print_diagnostics, print_json, say, say_line
from n3c.compiler.cli.progress import TerminalProgress
from n3c.compiler.cli.table import format_peak, format_table
from n3c.compiler.report.units import format_bytes

if TYPE_CHECKING:
    from n3c.compiler.quantization.driver import Quantized


@click.command("quantize", help="Quantize a checkpoint; without SPEC it is read from the checkpoint's config.")
@options.of(quantize)
@options.common
def command(part: str, as_json: bool, **_: Any) -> None:
    """Quantize WEIGHTS."""
    with TerminalProgress() as progress:
        quantized = quantize(**options.given(quantize), progress=progress)
    print_diagnostics(quantized.warnings)
    print_json(quantized.as_json()) if as_json else _print(quantized, part)


def _print(quantized: Quantized, part: str) -> None:
    outcome = quantized.outcome
    if not outcome.finished:
        say_line(f"ok: part {part.replace('/', ' of ')} of {outcome.out} in {quantized.seconds:.1f} s")
        say("when all parts are done, run the same command without --part and with --resume: it joins and checks them")
        return
    for line in quantized.prepared.opened:
        say_line(f"calibrated on {line}")
    rows = [
        (name, f"{entry['weights']:,}", format_bytes(entry["bytes"])) for name, entry in quantized.formats().items()
    ]
    say(format_table(("format", "weights", "bytes"), rows))
    errors = [
        (entry.role, entry.format, str(entry.weights), f"{entry.relative_error:.6f}")
        for entry in outcome.checked
        if entry.relative_error
    ]
    if errors:
        say("")
        say(format_table(("read back: role", "format", "weights", "relative error"), errors))
    say_line(f"ok: {outcome.out} in {quantized.seconds:.1f} s{format_peak(quantized.peak_rss_bytes)}")
