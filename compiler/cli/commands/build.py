"""n3c build: the compiler."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

from n3c.compiler import build
from n3c.compiler.building.driver import Built
from n3c.compiler.cli import options
from n3c.compiler.cli.command import n3c_command
from n3c.compiler.cli.output import print_diagnostics, print_json, say, say_line, suggest, tell
from n3c.compiler.cli.progress import TerminalProgress
from n3c.compiler.cli.table import format_peak, format_table
from n3c.compiler.report.units import format_bytes, format_time
from n3c.ir.diagnostics import ExitCode
from n3c.ir.program import Program
from n3c.passes.pipelines import DUMPED


@n3c_command(
    "build",
    "Compile SPEC to PyTorch code, ONNX graphs or TensorRT plans.",
    examples=(
        ("PyTorch code to read and train", "n3c build my-model.toml --target torch"),
        ("TensorRT plans for two GPUs, without a GPU", "n3c build my-model.toml --target trt --sm 89,120"),
        (
            "only the plan of a decode step, with a smaller cache",
            "n3c build super --target trt --entry decode --set serving.max_seq_len=4096",
        ),
        ("what the passes do", "n3c build tiny --target torch --print-ir-after all"),
    ),
    groups={
        "Graphs and plans": ("--entry", "--stages", "--weights-mode", "--trt", "--sm"),
        "Building plans": ("--jobs", "--no-cache", "--cache-size"),
        "For a closer look": ("--print-ir-after",),
    },
)
@options.of(build)
@click.option(
    "--print-ir-after",
    type=click.Choice([*DUMPED, "all"]),
    metavar="PASS",
    help="Print the IR on stderr after a pass that `n3c passes` lists, or after `all`.",
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
    if built.mismatches:
        return ExitCode.NUMERICS
    weights = options.given(build).get("weights", "DIR")
    trained = (("inspect", built.out, "--html", "page.html"),) if options.given(build)["target"] == "torch" else ()
    suggest(
        *trained,
        ("verify", built.out),
        ("run", built.out, "--weights", weights, "--prompt", "TEXT"),
    )
    return ExitCode.OK


def _print(built: Built) -> None:
    for file in built.files:
        say_line(f"{file['bytes']:>12,}  {built.out / file['path']}")
    tables = (*_traffic(built.traffic), *_times(built.time))
    say("".join(f"\n{table}\n" for table in tables), newline=bool(tables))
    verdict = "FAILED: precision not realised" if built.mismatches else "ok"
    say_line(f"{verdict}: {built.out} in {built.seconds:.1f} s{format_peak(built.peak_rss_bytes)}")


def _traffic(entries: dict[str, Any]) -> Iterator[str]:
    """Yield the tables of what a call of each plan moves over what it must, and of the kernel that is worst in it."""
    plans: list[tuple[str, ...]] = []
    kernels: list[tuple[str, ...]] = []
    for entry, found in entries.items():
        weighty = (item for item in found["by_kind"].items() if item[1]["ideal"] > found["ideal"] / 100)
        kinds = ", ".join(f"{kind} {moved['ratio']:.2f}" for kind, moved in weighty)
        plans.append((entry, f"{found['context']:,}", *_sizes(found), f"{found['ratio']:.3f}", kinds))
        worst = found["worst"][0]
        kernels.append((entry, worst["layer"] or worst["kind"], worst["op"], *_sizes(worst)))
    if plans:
        yield format_table(("plan", "context", "moves", "must move", "ratio", "by kind of layer"), plans)
        yield format_table(("plan", "layer", "kernel that moves most beyond", "moves", "must move"), kernels)


def _sizes(found: dict[str, Any]) -> tuple[str, str]:
    return format_bytes(found["bytes"]), format_bytes(found["ideal"])


def _times(entries: dict[str, Any]) -> Iterator[str]:
    """Yield the tables of the time predicted on the largest GPU of each plan, and of the kernels that lose most."""
    plans: list[tuple[str, ...]] = []
    kernels: list[tuple[str, ...]] = []
    for entry, by_gpu in entries.items():
        for gpu, found in list(by_gpu.items())[-1:]:
            ratio = f"{found['ratio']:.2f}" if found["ratio"] else ""
            plans.append((entry, gpu, format_time(found["predicted_us"]), ratio, found["bound_by"]))
            worst = found["worst"][0]
            times = format_time(worst["predicted_us"]), format_time(worst["least_us"])
            kernels.append((entry, worst["kind"], worst["op"], str(worst["kernels"]), *times, worst["bound_by"]))
    if plans:
        yield format_table(("plan", "GPU", "predicted", "over roofline", "bound by"), plans)
        header = ("plan", "layers", "kernels that lose most", "count", "predicted", "at least", "bound by")
        yield format_table(header, kernels)
