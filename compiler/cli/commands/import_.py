"""n3c import: a Hugging Face nemotron_h config becomes a spec."""

from __future__ import annotations

from typing import Any

from n3c.compiler import import_config
from n3c.compiler.cli import options
from n3c.compiler.cli.command import n3c_command
from n3c.compiler.cli.output import print_diagnostics, print_json, say, say_line, suggest


@n3c_command(
    "import",
    "Turn a Hugging Face config.json, or a checkpoint directory with one, into a spec.",
    examples=(
        ("a spec of a checkpoint", "n3c import path/to/checkpoint -o my-model.toml"),
        ("of a config alone, on stdout", "n3c import config.json"),
    ),
)
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
        suggest(("check", imported.out))
