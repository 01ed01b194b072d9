"""n3c export-config: a spec becomes a Hugging Face config.json."""

from __future__ import annotations

from typing import Any

from n3c.compiler import export_config
from n3c.compiler.cli import options
from n3c.compiler.cli.command import n3c_command
from n3c.compiler.cli.output import print_diagnostics, print_json, say, say_line


@n3c_command(
    "export-config",
    "Turn a SPEC into a Hugging Face nemotron_h config.json.",
    examples=(
        ("print the config", "n3c export-config super"),
        ("write it", "n3c export-config my-model.toml -o config.json"),
    ),
)
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
