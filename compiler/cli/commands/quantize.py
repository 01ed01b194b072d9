"""n3c quantize: a checkpoint in ModelOpt's layout."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from n3c.compiler.cli import options
from n3c.compiler.cli.output import print_diagnostics, print_json, say
from n3c.compiler.cli.progress import TerminalProgress
from n3c.compiler.cli.quantize_options import budget, sensitivity
from n3c.compiler.cli.table import format_bytes, format_table
from n3c.compiler.quantization.request import SEARCHES, QuantizeRequest

if TYPE_CHECKING:
    from n3c.compiler.quantization.driver import Quantized

_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}


class Part(click.ParamType[tuple[int, int]]):
    """`I/N`."""

    name = "I/N"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Return (I, N)."""
        found = re.fullmatch(r"(\d{1,5})/(\d{1,5})", str(value))
        if isinstance(value, tuple):
            return value
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            self.fail(f"{value!r} is not I/N with 1 ≤ I ≤ N", param, ctx)
        return int(found[1]), int(found[2])


class Size(click.ParamType[int]):
    """Bytes: `5GB`, `500MB`, `1000000`."""

    name = "SIZE"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return bytes."""
        found = re.fullmatch(r"(\d{1,15})\s*(|kb|mb|gb)", str(value).lower())
        if found is None or int(found[1]) == 0:
            self.fail(f"{value!r} is no size, as 5GB", param, ctx)
        return int(found[1]) * _UNITS[found[2]]


@click.command("quantize", help="Quantize a checkpoint; without SPEC it is read from the checkpoint's config.")
@click.argument("spec", required=False, type=click.Path(path_type=Path))
@click.option("--fmt", help="Format of every linear that no rule names: nvfp4, w4a16_nvfp4, fp8 or bf16.")
@click.option("--weights", required=True, type=click.Path(path_type=Path), help="Checkpoint directory to quantize.")
@click.option(
    "-o", "--output", "out", required=True, type=click.Path(path_type=Path), help="Output directory; must be new."
)
@click.option("--block", help="Weight blocks of NVFP4: 1x16 or 16x16.")
@click.option(
    "--search",
    type=click.Choice(SEARCHES),
    default="none",
    show_default=True,
    help="Block scales: nearest (none), or the neighbour with the least squared error (mse).",
)
@click.option("--resume", is_flag=True, help="Continue an interrupted run, or join finished parts.")
@click.option(
    "--part", type=Part(), default="1/1", help="Make only every N-th shard, from the I-th; join with --resume."
)
@click.option(
    "--max-shard-size", "max_shard_bytes", type=Size(), default="5GB", show_default=True, help="Most bytes of a file."
)
@sensitivity
@options.overrides
@options.common
def command(*, auto: bool, effective_bits: float | None, as_json: bool, **values: Any) -> None:
    """Quantize WEIGHTS."""
    from n3c.compiler.quantization.driver import quantize  # loads numpy, which --help does not need

    bits = budget(auto=auto, effective_bits=effective_bits, options=values)
    request = QuantizeRequest(effective_bits=bits, **values)
    with TerminalProgress() as progress:
        quantized = quantize(request, progress)
    print_diagnostics(quantized.warnings)
    print_json(quantized.as_json()) if as_json else _print(quantized, request.part)


def _print(quantized: Quantized, part: tuple[int, int]) -> None:
    outcome, formats = quantized.outcome, quantized.formats()
    if not outcome.finished:
        say(f"ok: part {part[0]} of {part[1]} of {outcome.out} in {quantized.seconds:.1f} s")
        say("when all parts are done, run the same command without --part and with --resume: it joins and checks them")
        return
    rows = [(name, f"{entry['weights']:,}", format_bytes(entry["bytes"])) for name, entry in formats.items()]
    say(format_table(("format", "weights", "bytes"), rows))
    errors = [
        (entry.role, entry.format, str(entry.weights), f"{entry.relative_error:.6f}")
        for entry in outcome.checked
        if entry.relative_error
    ]
    if errors:
        say("")
        say(format_table(("read back: role", "format", "weights", "relative error"), errors))
    peak = quantized.peak_rss_bytes / 2**30
    say(f"ok: {outcome.out} in {quantized.seconds:.1f} s, peak memory {peak:.2f} GiB")
