"""n3c import: a Hugging Face nemotron_h config becomes a spec."""

from __future__ import annotations

from pathlib import Path

import click

from n3c.compiler.cli import options
from n3c.compiler.cli.output import print_diagnostics, print_json, say
from n3c.specs.convert import run_import


@click.command("import", help="Turn a Hugging Face config.json, or a checkpoint directory with one, into a spec.")
@click.argument("source", metavar="CONFIG_JSON|CHECKPOINT_DIR", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Where to write the spec (default: stdout).")
@options.common
def command(source: Path, output: Path | None, as_json: bool) -> None:
    """Import SOURCE."""
    imported = run_import(source, output)
    print_diagnostics(imported.warnings)
    if as_json:
        warnings = [w.as_json() for w in imported.warnings]
        out = str(output) if output else None
        print_json({"ok": True, "name": imported.spec.name, "out": out, "spec": imported.text, "diagnostics": warnings})
    elif output is None:
        say(imported.text, newline=False)
    else:
        say(f"{output}: {imported.spec.name}")
