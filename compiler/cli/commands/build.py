"""n3c build: the compiler."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

from n3c.compiler import build
from n3c.compiler.building.driver import Built
from n3c.compiler.cli import options
from n3c.compiler.cli.output import print_diagnostics, print_json, say, say_line, tell
from n3c.compiler.cli.progress import TerminalProgress
from n3c.compiler.cli.table import format_peak
from n3c.compiler.report.units import format_bytes, format_time
from n3c.ir.diagnostics import ExitCode
from n3c.ir.program import Program
from n3c.passes.pipelines import DUMPED


@click.command("build", help="Compile SPEC to PyTorch code, ONNX graphs or TensorRT plans.")
@options.of(build)
@click.option(
    "--print-ir-after",
    type=click.Choice([*DUMPED, "all"]),
    help="Print the IR after a pass, on stderr.",
)
@options.common
def command(print_ir_after: str | None, as_json: bool, **_: Any) -> int:
    """Build SPEC."""

    def after(name: str, program: Program) -> None:
        if print_ir_after in (name, "all"):
            from n3c.ir.printer import print_program

            tell(f"// after {name}\n{print_program(program, origins=True)}")

    with TerminalProgress() as progress:
        built = build(**options.given(build), after=after, progress=progress)
    print_diagnostics((*built.warnings, *built.mismatches))
    if as_json:
        print_json(built.as_json())
    else:
        _print(built)
    return ExitCode.NUMERICS if built.mismatches else ExitCode.OK


def _print(built: Built) -> None:
    for file in built.files:
        say_line(f"{file['bytes']:>12,}  {built.out / file['path']}")
    if built.traffic:
        say(_audit(built.traffic, built.time))
    verdict = "FAILED: precision not realised" if built.mismatches else "ok"
    say_line(f"{verdict}: {built.out} in {built.seconds:.1f} s{format_peak(built.peak_rss_bytes)}")


def _audit(entries: dict[str, Any], times: dict[str, Any]) -> str:
    """Return what a step of each entry point moves over what it must, by layer kind, and the time that it may take."""
    lines: list[str] = []
    for entry, found in entries.items():
        moved, ideal = format_bytes(found["bytes"]), format_bytes(found["ideal"])
        weighty = (item for item in found["by_kind"].items() if item[1]["ideal"] > found["ideal"] / 100)
        kinds = ", ".join(f"{kind} {m['ratio']:.2f}" for kind, m in weighty)
        lines.append(
            f"{entry:<12} moves {moved} at {found['context']:,} tokens, {found['ratio']:.3f}x of {ideal} ({kinds})"
        )
        worst = found["worst"][0]
        place = f"{worst['op']} of {worst['layer'] or worst['kind']}"
        lines.append(f"{'':<12} worst: {format_bytes(worst['bytes'])} for {format_bytes(worst['ideal'])} in {place}")
        lines += [f"{'':<12} {line}" for line in _time(times.get(entry, {}))]
    return "\n".join(lines)


def _time(by_gpu: dict[str, Any]) -> Iterator[str]:
    """Yield the predicted time on the largest of the GPUs, and the op that loses most there."""
    if not by_gpu:
        return
    gpu, found = list(by_gpu.items())[-1]
    ratio = f"{found['ratio']:.2f}x of its roofline" if found["ratio"] else "no roofline"
    yield f"predicted: {format_time(found['predicted_us'])} on {gpu}, {ratio}, bound by {found['bound_by']}"
    worst = found["worst"][0]
    yield (
        f"worst: {format_time(worst['predicted_us'])} for {format_time(worst['least_us'])} in {worst['kernels']} "
        f"kernels, {worst['op']} of {worst['kind']}, bound by {worst['bound_by']}"
    )
