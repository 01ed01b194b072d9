"""n3c import: a Hugging Face nemotron_h config becomes a spec."""

from __future__ import annotations

from typing import Any

import click

from n3c.compiler import import_config
from n3c.compiler.cli import options
from n3c.compiler.cli.output import print_diagnostics, print_json, say, say_line


@click.command("import", help="Turn a Hugging Face config.json, or a checkpoint directory with one, into a spec.")
@options.of(import_config)
@options.common
def command(as_json: bool, **_: Any) -> None:
    """Import SOURCE."""
    imported = import_config(**options.given(import_config))
    print_diagnostics(imported.warnings)
    if as_json:
        print_json(imported.as_json())
    elif imported.out is None:
        say(imported.text, newline=False)
    else:
        say_line(f"{imported.out}: {imported.spec.name}")
