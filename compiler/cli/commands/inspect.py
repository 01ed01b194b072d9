"""n3c inspect: what a spec, a checkpoint or a build holds and costs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from n3c.compiler import inspect
from n3c.compiler.cli import options
from n3c.compiler.cli.command import n3c_command
from n3c.compiler.cli.fits import format_fits
from n3c.compiler.cli.output import print_diagnostics, print_json, say, say_line, suggest
from n3c.compiler.cli.progress import TerminalProgress
from n3c.compiler.cli.table import format_table
from n3c.compiler.report.units import format_bytes, format_count, format_time
from n3c.runtime.predicted import PredictedTime


@n3c_command(
    "inspect",
    "Count parameters, FLOPs, weight and state bytes of a SPEC, a checkpoint's config or a build.",
    examples=(
        ("a shipped model", "n3c inspect super"),
        ("which RTX 50 cards hold 4 sequences of 32768 tokens", "n3c inspect super --sm 120 --batch 4 --context 32768"),
        (
            "a quantized checkpoint, as a page with its error",
            "n3c inspect my-nvfp4 --html page.html --original my-bf16",
        ),
        ("a build", "n3c inspect build/my-model"),
    ),
    groups={
        "What fits": ("--context", "--batch", "--sm", "--trt", "--memory"),
        "The page": ("--html", "--original", "--run", "--force"),
    },
)
@options.of(inspect)
@options.common
def command(path: Path, as_json: bool, **_: Any) -> None:
    """Inspect PATH."""
    with TerminalProgress() as progress:
        inspected = inspect(**options.given(inspect), progress=progress)
    print_diagnostics(inspected.warnings)
    if as_json:
        print_json(inspected.as_json())
    elif inspected.kind == "build":
        _print_build(path, inspected.figures)
        if inspected.times:
            _print_times(inspected.times)
    else:
        _print_spec(inspected.figures)
    if inspected.kind == "spec" and str(path) != "-":
        overrides = options.overrides(options.given(inspect))
        page = () if "html" in options.given(inspect) else (("inspect", path, "--html", "page.html", *overrides),)
        suggest(("build", path, "--target", "torch", *overrides), *page)
    elif inspected.kind == "checkpoint":
        suggest(("import", path, "-o", "SPEC.toml"), ("quantize", "--weights", path, "-o", "OUT"))
    elif inspected.kind == "build":
        suggest(("verify", path))


def _print_spec(figures: dict[str, Any]) -> None:
    parameters, state, decode = figures["parameters"], figures["state"], figures["decode"]
    layers = figures["layers"]
    kinds = ", ".join(f"{count} {kind}" for kind, count in layers.items() if kind != "total")
    say(f"{figures['name']}: {layers['total']} layers ({kinds})\n")
    total = sum(parameters["by_role"].values())
    rows = [(role, f"{count:,}", f"{100 * count / total:.2f} %") for role, count in parameters["by_role"].items()]
    say(format_table(("role", "parameters", "share"), rows))
    say(f"\nparameters         {parameters['total']:,} ({format_count(parameters['total'])}) without MTP")
    say(f"active a token     {parameters['active']:,} ({format_count(parameters['active'])})")
    say(f"MTP block          {parameters['mtp']:,}")
    say(f"FLOPs a token      {figures['flops_per_token']:,} at {decode['context']:,} tokens of context\n")
    formats = [(format_, format_bytes(size)) for format_, size in figures["weights"]["by_format"].items()]
    say(format_table(("format", "weights"), [*formats, ("all", format_bytes(figures["weights"]["bytes"]))]))
    mtp = state["mtp_kv_bytes_per_token"]
    say(f"\nKV cache           {state['kv_bytes_per_token']:,} bytes a token" + (f", MTP block {mtp:,}" if mtp else ""))
    say(
        f"states a request   {state['bytes_per_request']:,} bytes"
        f" (SSM {state['ssm_bytes_per_request']:,}, convolution {state['conv_bytes_per_request']:,})"
    )
    snapshots = state["snapshots"]
    if snapshots["draft_tokens"]:
        say(
            f"drafted tokens     {snapshots['pending_bytes']:,} bytes a request for {snapshots['draft_tokens']}"
            f"\n{'':<19}({snapshots['full_copies_bytes']:,} if the states were copied)"
        )
    moved = decode["bytes"]
    say(f"\ndecode at batch {decode['batch']}, {decode['context']:,} tokens of context")
    say(f"  memory           {format_bytes(decode['memory_bytes'])}")
    say(
        f"  moved a step     {format_bytes(moved['total'])} (weights {format_bytes(moved['weights'])},"
        f" states {format_bytes(moved['states'])}, KV {format_bytes(moved['kv_cache'])})"
    )
    say(f"  intensity        {decode['flops_per_byte']} FLOPs a byte")
    say(f"  roofline         {decode['tokens_per_second_at_1_TB_per_s']:,} tokens/s for each TB/s of memory bandwidth")
    say(f"\nwhat fits, {decode['batch']} x {decode['context']:,} tokens\n")
    say(format_fits(figures["fits"]))
    if "checkpoint" in figures:
        _print_checkpoint(figures["checkpoint"])


def _print_checkpoint(held: dict[str, Any]) -> None:
    say(f"\nheld by the checkpoint ({held['layout']} layout, {held['tensors']:,} tensors in {held['files']} files)\n")
    rows = [(name, f"{entry['weights']:,}", format_bytes(entry["bytes"])) for name, entry in held["by_format"].items()]
    say(format_table(("format", "weights", "bytes"), [*rows, ("all", "", format_bytes(held["bytes"]))]))


def _print_build(path: Path, manifest: dict[str, Any]) -> None:
    say_line(f"{path}: {manifest['spec']['name']} (spec {manifest['spec']['sha256'][:12]})")
    say("")
    formats: dict[str, tuple[int, int]] = {}
    for entry in manifest["ledger"]:
        count, size = formats.get(entry["format"], (0, 0))
        formats[entry["format"]] = (count + 1, size + entry["bytes"])
    rows = [(name, str(count), format_bytes(size)) for name, (count, size) in sorted(formats.items())]
    say(format_table(("format", "weights", "bytes"), rows))
    say("")
    say(format_table(("file", "bytes"), [(file["path"], f"{file['bytes']:,}") for file in manifest["files"]]))


def _print_times(times: Mapping[str, Mapping[str, PredictedTime]]) -> None:
    say("\npredicted time of a call (docs/engine-forms.md); nothing was measured\n")
    rows = [
        (
            entry,
            gpu,
            format_time(time.microseconds),
            format_time(time.roofline_microseconds),
            f"{time.ratio:.2f}",
            time.bound_by,
        )
        for entry, by_gpu in times.items()
        for gpu, time in by_gpu.items()
    ]
    say(format_table(("entry", "GPU", "predicted", "roofline", "ratio", "bound by"), rows))
