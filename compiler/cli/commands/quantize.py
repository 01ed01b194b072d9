"""n3c quantize: a checkpoint in ModelOpt's layout."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from n3c.compiler import quantize
from n3c.compiler.cli import options
from n3c.compiler.cli.command import n3c_command
from n3c.compiler.cli.output import print_diagnostics, print_json, say, say_line, suggest
from n3c.compiler.cli.progress import TerminalProgress
from n3c.compiler.cli.table import format_peak, format_table
from n3c.compiler.report.units import format_bytes

if TYPE_CHECKING:
    from n3c.compiler.quantization.driver import Quantized


@n3c_command(
    "quantize",
    "Quantize a checkpoint; without SPEC it is read from the checkpoint's config.",
    examples=(
        ("the formats of the published recipe", "n3c quantize --weights my-bf16 -o my-nvfp4"),
        ("those of a spec", "n3c quantize my-model.toml --weights my-bf16 -o my-nvfp4 --search mse"),
        ("after a crash", "n3c quantize my-model.toml --weights my-bf16 -o my-nvfp4 --search mse --resume"),
        (
            "the formats of least harm within 4.8 bits a weight",
            "n3c quantize --weights my-bf16 -o my-nvfp4 --auto --calibration tokens.npy",
        ),
    ),
    groups={
        "Formats": ("--fmt", "--block", "--search", "--like", "--multimodal"),
        "Formats by their harm": ("--auto", "--effective-bits", "--auto-mtp"),
        "Activations": (
            "--calibration",
            "--calibration-samples",
            "--calibration-length",
            "--activation-scales",
            "--save-activation-scales",
        ),
        "Files": ("--resume", "--part", "--max-shard-size", "--write-spec", "--force"),
    },
)
@options.of(quantize)
@options.common
def command(spec: Path | None, output: Path, part: str, as_json: bool, **_: Any) -> None:
    """Quantize WEIGHTS."""
    with TerminalProgress() as progress:
        quantized = quantize(**options.given(quantize), progress=progress)
    print_diagnostics(quantized.warnings)
    print_json(quantized.as_json()) if as_json else _print(quantized, part)
    if quantized.outcome.finished:
        described = (("import", output, "-o", "SPEC.toml"),) if spec is None else ()
        suggest(*described, ("build", spec or "SPEC.toml", "--target", "trt", "--weights", output))


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
