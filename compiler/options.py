"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
debug = click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks.")
overrides = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a spec value, as moe.top_k=8; may repeat."
)
spec = click.argument("spec", type=click.Path(path_type=Path))
sm = click.option("--sm", type=int, default=120, show_default=True, help="GPU architecture to build for.")


def common(command: F) -> F:
    """Add --json and --debug, which every command has."""
    return as_json(debug(command))
