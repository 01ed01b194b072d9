"""n3c check: everything that would fail later, without weights, GPU, torch import or build."""

from __future__ import annotations

from pathlib import Path

import click

from n3c.backends.onnx.forms import Form
from n3c.backends.trt.targets import Flavour
from n3c.compiler.building.checks import check
from n3c.compiler.cli import options
from n3c.compiler.cli.output import print_diagnostics, print_json, say
from n3c.compiler.cli.table import format_table
from n3c.ir.diagnostics import Diagnostic

from .inspect import format_fits


@click.command("check", help="Find everything that would fail later, without weights, GPU or build.")
@options.spec
@click.option("--target", type=click.Choice(["torch", "onnx", "trt"]), help="Check for this target only.")
@options.sms
@options.trt
@click.option("--context", type=click.IntRange(min=1), help="Say what fits where with this many tokens a sequence.")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Sequences.")
@options.overrides
@options.common
def command(
    spec: Path,
    context: int | None,
    batch: int,
    target: str | None,
    sms: tuple[int, ...],
    trt: Flavour,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Check SPEC."""
    checked = check(spec, overrides, target=target, sms=sms, flavour=trt, context=context, batch=batch)
    print_diagnostics(checked.warnings)
    if as_json:
        print_json(
            {
                "ok": True,
                "name": checked.name,
                "sms": list(sms),
                "forms": [form.as_json() for form in checked.forms],
                "fits": [room.as_json() for room in checked.rooms],
                "diagnostics": [w.as_json() for w in checked.warnings],
            }
        )
        return
    say(f"{spec}: ok ({checked.name})" + _counted(checked.warnings))
    if target == "trt":
        say(_forms(checked.forms))
    if context is not None:
        say(format_fits([room.as_json() for room in checked.rooms]))


def _forms(forms: tuple[Form, ...]) -> str:
    rows = [(form.entry, form.weights, form.format, form.how) for form in forms]
    return format_table(("entry", "weights", "format", "form"), rows)


def _counted(warnings: list[Diagnostic]) -> str:
    return f", {len(warnings)} warning{'s' if len(warnings) > 1 else ''}" if warnings else ""
