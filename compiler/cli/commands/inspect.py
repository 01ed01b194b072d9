"""n3c inspect: what a spec, a checkpoint or a build holds and costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from n3c.compiler.cli import options
from n3c.compiler.cli.output import print_diagnostics, print_json, say
from n3c.compiler.cli.table import format_bytes, format_count, format_table
from n3c.compiler.report.cost import inspect_spec
from n3c.runtime.manifest import MANIFEST, out_error, read_manifest
from n3c.specs.convert import run_import
from n3c.specs.load import load_spec


@click.command(
    "inspect", help="Count parameters, FLOPs, weight and state bytes of a SPEC, a checkpoint's config or a build."
)
@click.argument("path", metavar="SPEC|CHECKPOINT|BUILD", type=click.Path(path_type=Path))
@click.option("--context", type=click.IntRange(min=1), help="Tokens in the cache (default: serving.max_seq_len).")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Sequences.")
@options.overrides
@options.common
def command(path: Path, context: int | None, batch: int, overrides: tuple[str, ...], as_json: bool) -> None:
    """Inspect PATH."""
    if overrides and (path.is_dir() or path.suffix == ".json"):
        raise click.UsageError(f"--set changes specs, and {path} is none: import it first (`n3c import`)")
    if (path / MANIFEST).is_file():
        manifest = read_manifest(path)
        if manifest is None:
            raise out_error("E0614", f"{MANIFEST} is not one of n3c", path / MANIFEST)
        print_json(manifest) if as_json else _print_build(path, manifest)
        return
    if path.is_dir() or path.suffix == ".json":
        imported = run_import(path, formats_matter=False)
        spec, warnings = imported.spec, list(imported.warnings)
    else:
        spec, warnings = load_spec(path, overrides)
    figures = inspect_spec(spec, context=context, batch=batch)
    if path.is_dir() and any(path.glob("*.safetensors*")):
        from n3c.backends.safetensors.checkpoint import Checkpoint
        from n3c.backends.safetensors.inventory import inventory

        figures["checkpoint"] = inventory(Checkpoint(path)).as_json()
    print_diagnostics(warnings)
    print_json(figures) if as_json else _print_spec(figures)


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
            f" (full copies of the states would be {snapshots['full_copies_bytes']:,})"
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


def format_fits(fits: list[dict[str, Any]]) -> str:
    """Lay out what each size of card takes."""
    rows = [
        (
            f"{room['gpu_gb']} GB ({room['cards']})",
            "yes" if room["fits"] else "no",
            f"{room['longest_context']:,}",
            f"{room['most_requests']:,}",
            str(room["gpus"]),
        )
        for room in fits
    ]
    return format_table(("GPU", "fits", "longest context", "most requests", "GPUs needed"), rows)


def _print_checkpoint(held: dict[str, Any]) -> None:
    say(f"\nheld by the checkpoint ({held['layout']} layout, {held['tensors']:,} tensors in {held['files']} files)\n")
    rows = [(name, f"{entry['weights']:,}", format_bytes(entry["bytes"])) for name, entry in held["by_format"].items()]
    say(format_table(("format", "weights", "bytes"), [*rows, ("all", "", format_bytes(held["bytes"]))]))


def _print_build(path: Path, manifest: dict[str, Any]) -> None:
    say(f"{path}: {manifest['spec']['name']} (spec {manifest['spec']['sha256'][:12]})\n")
    formats: dict[str, tuple[int, int]] = {}
    for entry in manifest["ledger"]:
        count, size = formats.get(entry["format"], (0, 0))
        formats[entry["format"]] = (count + 1, size + entry["bytes"])
    rows = [(name, str(count), format_bytes(size)) for name, (count, size) in sorted(formats.items())]
    say(format_table(("format", "weights", "bytes"), rows))
    say("")
    say(format_table(("file", "bytes"), [(file["path"], f"{file['bytes']:,}") for file in manifest["files"]]))
