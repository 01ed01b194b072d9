"""n3c passes: lowering and the passes, in the order in which they run, with their options."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from typing import Any

from n3c.compiler.cli import options
from n3c.compiler.cli.command import n3c_command
from n3c.compiler.cli.output import print_json, say
from n3c.passes.lower import model as lowering
from n3c.passes.pipelines import ELSEWHERE, SERVING, STAGES, added_stages


@n3c_command(
    "passes",
    "List the passes in the order in which they run.",
    examples=(("in the order in which they run", "n3c passes"),),
)
@options.common
def command(as_json: bool) -> None:
    """List the passes."""
    lower = {"name": "lower", "summary": _summary(lowering.__name__), "options": []}
    described = [lower, *(_describe(pass_) for pass_ in (*(stage.pass_ for stage in SERVING), *ELSEWHERE))]
    added = [{**_describe(stage.pass_), "after": stage.after} for stage in added_stages().values()]
    if as_json:
        print_json({"passes": [*described, *added], "pipelines": {"serving": list(STAGES)}})
        return
    for entry in described:
        say(f"{entry['name']:<12} {entry['summary']}")
        for option in entry["options"]:
            say(f"{'':<12}   {option}")
    say(f"\nserving: {' → '.join(STAGES)}")
    for entry in added:
        say(f"\n{entry['name']:<12} {entry['summary']}")
        say(f"{'':<12} of an extension: `serving.passes` of a spec adds it, after {entry['after']}")


def _describe(pass_: type[Any]) -> dict[str, Any]:
    fields = [f"{field.name}: {field.type}" for field in dataclasses.fields(pass_)]
    return {"name": pass_.name, "summary": _summary(pass_.__module__), "options": fields}


def _summary(module: str) -> str:
    """Return what the docstring of a pass's module says after its name."""
    return inspect.cleandoc(sys.modules[module].__doc__ or "").splitlines()[0].partition(": ")[2]
