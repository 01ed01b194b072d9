"""n3c export-config: a spec becomes a Hugging Face config.json."""

from __future__ import annotations

from typing import Any

import click

from n3c.compiler import export_config
from n3c.compiler.cli import options
from n3c.compiler.cli.output import print_diagnostics, print_json, say, say_line


@click.command("export-config", help="Turn a SPEC into a Hugging Face nemotron_h config.json.")
@options.of(export_config)
@options.common
def command(as_json: bool, **_: Any) -> None:
    """Export SPEC."""
    exported = export_config(**options.given(export_config))
    print_diagnostics(exported.warnings)
    if as_json:
        print_json(exported.as_json())
    elif exported.out is None:
        say(exported.text, newline=False)
    else:
        say_line(f"{exported.out}: {exported.spec.name}")
