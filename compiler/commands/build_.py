"""n3c build: the compiler."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from n3c.compiler import options
from n3c.compiler.driver import TARGETS, Build, Request, build
from n3c.compiler.output import print_diagnostics, print_json, say, tell
from n3c.compiler.progress import Progress
from n3c.ir.diagnostics import ExitCode
from n3c.ir.program import Program
from n3c.passes.pipelines import SERVING


@click.command("build", help="Compile SPEC to PyTorch code, ONNX graphs or TensorRT plans.")
@options.spec
@click.option("--target", type=click.Choice(TARGETS), required=True, help="What to build.")
@click.option(
    "-o", "--output", "out", type=click.Path(path_type=Path), help="Output directory (default: build/<name>)."
)
@click.option("--weights", type=click.Path(path_type=Path), help="Checkpoint directory; its tensors must fit the spec.")
@click.option("--trt", type=click.Choice(["rtx", "full"]), default="rtx", show_default=True, help="Which TensorRT.")
@options.sm
@click.option(
    "--weights-mode",
    type=click.Choice(["bound"]),
    default="bound",
    show_default=True,
    help="Bound: weights are inputs of the engine.",
)
@click.option(
    "--stages",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Cut each entry point into this many plans, at layer boundaries.",
)
@click.option(
    "--print-ir-after", type=click.Choice(["lower", *SERVING, "all"]), help="Print the IR after a pass, on stderr."
)
@options.overrides
@options.common
def command(
    spec: Path,
    target: str,
    out: Path | None,
    weights: Path | None,
    trt: Literal["rtx", "full"],
    sm: int,
    weights_mode: str,
    stages: int,
    print_ir_after: str | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> int:
    """Build SPEC."""
    del weights_mode  # the one mode there is; the flag keeps command lines stable

    def after(name: str, program: Program) -> None:
        if print_ir_after in (name, "all"):
            from n3c.ir.printer import print_program

            tell(f"// after {name}\n{print_program(program, origins=True)}")

    with Progress() as progress:
        built = build(Request(spec, target, out, overrides, weights, trt, sm, stages), progress, after)
    print_diagnostics((*built.warnings, *built.mismatches))
    if as_json:
        print_json(built.as_json())
    else:
        _print(built)
    return ExitCode.NUMERICS if built.mismatches else ExitCode.OK


def _print(built: Build) -> None:
    for file in built.files:
        say(f"{file['bytes']:>12,}  {built.out / file['path']}")
    peak = built.as_json()["peak_rss_bytes"] / 2**30
    verdict = "FAILED: precision not realised" if built.mismatches else "ok"
    say(f"{verdict}: {built.out} in {built.seconds:.1f} s, peak memory {peak:.2f} GiB")
