"""n3c build: the compiler."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click

from n3c.backends.trt.targets import Flavour
from n3c.compiler.building.driver import Build, build
from n3c.compiler.building.request import TARGETS, Request
from n3c.compiler.cli import options
from n3c.compiler.cli.output import print_diagnostics, print_json, say, tell
from n3c.compiler.cli.progress import TerminalProgress
from n3c.compiler.cli.table import format_bytes
from n3c.ir.diagnostics import ExitCode
from n3c.ir.program import Program
from n3c.passes.pipelines import STAGES

ENTRIES = ("prefill", "decode", "verify", "draft")


@click.command("build", help="Compile SPEC to PyTorch code, ONNX graphs or TensorRT plans.")
@options.spec
@click.option("--target", type=click.Choice(TARGETS), required=True, help="What to build.")
@click.option(
    "-o", "--output", "out", type=click.Path(path_type=Path), help="Output directory (default: build/<name>)."
)
@click.option("--weights", type=click.Path(path_type=Path), help="Checkpoint directory; its tensors must fit the spec.")
@options.trt
@options.sms
@click.option(
    "--weights-mode",
    type=click.Choice(["bound", "embedded"]),
    default="bound",
    show_default=True,
    help="Bound: weights are inputs of the engine. Embedded: constants in graph and plan; needs --weights.",
)
@click.option(
    "--entry",
    "entries",
    type=click.Choice(ENTRIES),
    multiple=True,
    help="Build this entry point only; may repeat. Default: all.",
)
@click.option(
    "--stages",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Cut each entry point into this many plans, at layer boundaries.",
)
@click.option(
    "--print-ir-after",
    type=click.Choice([*STAGES, "all"]),
    help="Print the IR after a pass, on stderr.",
)
@options.overrides
@options.common
def command(
    spec: Path,
    target: str,
    out: Path | None,
    weights: Path | None,
    trt: Flavour,
    sms: tuple[int, ...],
    weights_mode: Literal["bound", "embedded"],
    entries: tuple[str, ...],
    stages: int,
    print_ir_after: str | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> int:
    """Build SPEC."""

    def after(name: str, program: Program) -> None:
        if print_ir_after in (name, "all"):
            from n3c.ir.printer import print_program

            tell(f"// after {name}\n{print_program(program, origins=True)}")

    with TerminalProgress() as progress:
        request = Request(spec, target, out, overrides, weights, trt, sms, stages, entries, weights_mode)
        built = build(request, progress, after)
    print_diagnostics((*built.warnings, *built.mismatches))
    if as_json:
        print_json(built.as_json())
    else:
        _print(built)
    return ExitCode.NUMERICS if built.mismatches else ExitCode.OK


def _print(built: Build) -> None:
    for file in built.files:
        say(f"{file['bytes']:>12,}  {built.out / file['path']}")
    if built.traffic:
        say(_traffic(built.traffic))
    peak = built.as_json()["peak_rss_bytes"] / 2**30
    verdict = "FAILED: precision not realised" if built.mismatches else "ok"
    say(f"{verdict}: {built.out} in {built.seconds:.1f} s, peak memory {peak:.2f} GiB")


def _traffic(entries: dict[str, Any]) -> str:
    """Return what a step of each entry point moves over what it must: in all, by layer kind, and the worst kernel."""
    lines: list[str] = []
    for entry, found in entries.items():
        moved, ideal = format_bytes(found["bytes"]), format_bytes(found["ideal"])
        weighty = (item for item in found["by_kind"].items() if item[1]["ideal"] > found["ideal"] / 100)
        kinds = ", ".join(f"{kind} {m['ratio']:.2f}" for kind, m in weighty)
        lines.append(
            f"{entry:<12} moves {moved} at {found['context']:,} tokens, {found['ratio']:.3f}x of {ideal} ({kinds})"
        )
        worst = found["worst"][0]
        place = f"{worst['kernel'].removeprefix('__myl_')} of {worst['layer'] or worst['kind']}"
        lines.append(f"{'':<12} worst: {format_bytes(worst['bytes'])} for {format_bytes(worst['ideal'])} in {place}")
    return "\n".join(lines)
