"""n3c passes: the passes, in the order of the serving pipeline, with their options."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from typing import Any

import click

from n3c.compiler.cli import options
from n3c.compiler.cli.output import print_json, say
from n3c.passes.pipelines import PASSES, SERVING


@click.command("passes", help="List the passes.")
@options.common
def command(as_json: bool) -> None:
    """List the passes."""
    described = [_describe(name) for name in PASSES]
    if as_json:
        print_json({"passes": described, "pipelines": {"serving": list(SERVING)}})
        return
    for entry in described:
        say(f"{entry['name']:<12} {entry['summary']}")
        for option in entry["options"]:
            say(f"{'':<12}   {option}")
    say(f"\nserving: {' → '.join(SERVING)}")


def _describe(name: str) -> dict[str, Any]:
    module_name, _, class_name = PASSES[name].partition(":")
    module = importlib.import_module(module_name)
    pass_ = getattr(module, class_name)
    summary = inspect.cleandoc(module.__doc__ or "").splitlines()[0].partition(": ")[2]
    fields = [f"{field.name}: {field.type}" for field in dataclasses.fields(pass_)]
    return {"name": name, "summary": summary, "options": fields}
