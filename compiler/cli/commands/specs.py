"""n3c specs: the shipped specs."""

from __future__ import annotations

import re
from typing import Any

from n3c.compiler.cli import options
from n3c.compiler.cli.command import n3c_command
from n3c.compiler.cli.output import print_json, say_line, suggest
from n3c.compiler.report.cost import layer_counts
from n3c.specs.files import read_text
from n3c.specs.load import parse_spec
from n3c.specs.shipped import shipped_specs


@n3c_command(
    "specs",
    "List the specs that n3c ships; their names stand for them wherever a SPEC is taken.",
    examples=(("their names and sizes", "n3c specs"),),
)
@options.common
def command(as_json: bool) -> None:
    """List the specs."""
    found = [_described(name, read_text(path), str(path)) for name, path in shipped_specs().items()]
    if as_json:
        print_json({"specs": found})
        return
    width = max(len(entry["name"]) for entry in found)
    for entry in found:
        say_line(f"{entry['name']:<{width}}  {entry['summary']}")
    suggest(("inspect", "super"), ("init", "FILE", "--from", "super"))


def _described(name: str, text: str, file: str) -> dict[str, Any]:
    """Return what is told of a spec; the summary is its first comment line without sources."""
    spec, _ = parse_spec(text, file)
    summary = re.sub(r"\s*\([^)]*\)", "", text.partition("\n")[0].removeprefix("# ")).rstrip(".")
    return {"name": name, "file": file, "model": spec.name, "summary": summary, "layers": layer_counts(spec)}
