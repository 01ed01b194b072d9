"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from n3c.backends.trt.targets import PORTABLE

F = TypeVar("F", bound=Callable[..., Any])

as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
debug = click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks.")
overrides = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a spec value, as moe.top_k=8; may repeat."
)
spec = click.argument("spec", type=click.Path(path_type=Path))


class _Sms(click.ParamType[tuple[int, ...]]):
    """`120`, `80,86` or `portable` → SM versions, each once."""

    name = "SM[,SM]|portable"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Return the SM versions; whether they are targets is for the command to say."""
        if value == "portable":
            return PORTABLE
        parts = str(value).split(",")
        if not all(part.strip().isascii() and part.strip().isdigit() and len(part) < 6 for part in parts):
            self.fail(f"{value!r} is no SM version, list of them or `portable`", param, ctx)
        return tuple(dict.fromkeys(int(part) for part in parts))


sms = click.option(
    "--sm",
    "sms",
    type=_Sms(),
    default="120",
    show_default=True,
    help="GPU architectures to build for: one plan for all of them.",
)
trt = click.option(
    "--trt", type=click.Choice(["rtx", "full"]), default="rtx", show_default=True, help="Which TensorRT."
)


def common(command: F) -> F:
    """Add --json and --debug, which every command has."""
    return as_json(debug(command))
