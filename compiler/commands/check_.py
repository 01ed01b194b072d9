"""n3c check: everything that would fail later, without weights, GPU, torch import or build."""

from __future__ import annotations

from pathlib import Path

import click

from n3c.compiler import options
from n3c.compiler.checking import check
from n3c.compiler.output import print_diagnostics, print_json, say
from n3c.ir.diagnostics import Diagnostic


@click.command("check", help="Find everything that would fail later, without weights, GPU or build.")
@options.spec
@click.option("--target", type=click.Choice(["torch", "onnx", "trt"]), help="Check for this target only.")
@options.sm
@options.overrides
@options.common
def command(spec: Path, target: str | None, sm: int, overrides: tuple[str, ...], as_json: bool) -> None:
    """Check SPEC."""
    name, warnings = check(spec, overrides, target=target, sm=sm)
    print_diagnostics(warnings)
    if as_json:
        print_json({"ok": True, "name": name, "diagnostics": [w.as_json() for w in warnings]})
    else:
        say(f"{spec}: ok ({name})" + _counted(warnings))


def _counted(warnings: list[Diagnostic]) -> str:
    return f", {len(warnings)} warning{'s' if len(warnings) > 1 else ''}" if warnings else ""
