"""n3c schema: the JSON Schema of specs, for editors."""

from __future__ import annotations

from n3c.compiler.cli import options
from n3c.compiler.cli.command import n3c_command
from n3c.compiler.cli.output import print_json
from n3c.specs.json_schema import json_schema
from n3c.specs.kinds import require_all


@n3c_command(
    "schema",
    "Print the JSON Schema of specs.",
    examples=(("for an editor", "n3c schema > n3c.schema.json"),),
)
@options.common
def command(as_json: bool) -> None:
    """Print the schema, with the tables of extensions; it is JSON with and without --json."""
    del as_json
    require_all()
    print_json(json_schema())
