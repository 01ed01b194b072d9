"""n3c export-config: a spec becomes a Hugging Face config.json."""

from __future__ import annotations

import json
from pathlib import Path

import click

from n3c.compiler.cli import options
from n3c.compiler.cli.output import print_diagnostics, print_json, say
from n3c.specs.convert import run_export_config
from n3c.specs.load import load_spec


@click.command("export-config", help="Turn a SPEC into a Hugging Face nemotron_h config.json.")
@options.spec
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Where to write it (default: stdout).")
@options.overrides
@options.common
def command(spec: Path, output: Path | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Export SPEC."""
    loaded, warnings = load_spec(spec, overrides)
    text = run_export_config(loaded, output)
    print_diagnostics(warnings)
    if as_json:
        diagnostics = [w.as_json() for w in warnings]
        out = str(output) if output else None
        print_json({"ok": True, "out": out, "config": json.loads(text), "diagnostics": diagnostics})
    elif output is None:
        say(text, newline=False)
    else:
        say(f"{output}: {loaded.name}")
