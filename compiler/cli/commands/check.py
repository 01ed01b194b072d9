"""n3c check: everything that would fail later, without weights, GPU, torch import or build."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from n3c.compiler import check
from n3c.compiler.cli import options
from n3c.compiler.cli.fits import format_fits
from n3c.compiler.cli.output import print_diagnostics, print_json, say, say_line
from n3c.compiler.cli.table import format_table

if TYPE_CHECKING:  # only asked for what a target's forms are
    from n3c.backends.onnx.forms import Form


@click.command("check", help="Find everything that would fail later, without weights, GPU or build.")
@options.of(check)
@options.common
def command(spec: Path, as_json: bool, **_: Any) -> None:
    """Check SPEC."""
    given = options.given(check)
    checked = check(**given)
    print_diagnostics(checked.warnings)
    if as_json:
        print_json(checked.as_json())
        return
    count = len(checked.warnings)
    counted = f", {count} warning{'s' if count > 1 else ''}" if count else ""
    say_line(f"{spec}: ok ({checked.spec.name}){counted}")
    if checked.target == "trt":
        say(_forms(checked.forms()))
    if {"context", "batch", "memory"} & set(given):
        say(format_fits([fit.as_json() for fit in checked.fits]))


def _forms(forms: tuple[Form, ...]) -> str:
    rows = [(form.entry, form.weights, form.format, form.how) for form in forms]
    return format_table(("entry", "weights", "format", "form"), rows)
