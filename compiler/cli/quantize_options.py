"""The options of `n3c quantize` for sensitive layers and activations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

_PATH = click.Path(path_type=Path)
DEFAULT_BITS = 4.8
"""AutoQuantize's own default."""

_OPTIONS = (
    click.option("--like", type=_PATH, help="Take the formats of this released checkpoint (directory or config file)."),
    click.option("--auto", is_flag=True, help="Choose the formats: the least harm within --effective-bits."),
    click.option(
        "--effective-bits",
        type=click.FloatRange(0, 16, min_open=True),
        help=f"Most bits a weight of --auto, over the linears it may quantize (default: {DEFAULT_BITS}).",
    ),
    click.option("--auto-mtp", "mtp", is_flag=True, help="Let --auto quantize the MTP block too."),
    click.option("--calibration", type=_PATH, help="Tokens (.npy, .bin) or, where tokens are bytes, text."),
    click.option(
        "--calibration-samples",
        "samples",
        type=click.IntRange(min=1),
        default=128,
        show_default=True,
        help="Sequences to take of it.",
    ),
    click.option(
        "--calibration-length",
        "length",
        type=click.IntRange(min=2),
        default=512,
        show_default=True,
        help="Tokens of a sequence.",
    ),
    click.option("--activation-scales", type=_PATH, help="Reuse saved activation scales (.json or .safetensors)."),
    click.option("--save-activation-scales", type=_PATH, help="Save the calibrated scales (.json or .safetensors)."),
    click.option("--write-spec", type=_PATH, help="Write the spec with its final rules."),
)


def sensitivity(command: F) -> F:
    """Add the options to a command; but for --auto and --effective-bits they are named as fields of the request."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def budget(*, auto: bool, effective_bits: float | None, options: Mapping[str, Any]) -> float | None:
    """Return the bits a weight that --auto may spend; None without --auto. UsageError for what does not go together."""
    refusals = (
        (options["like"] is not None and auto, "--like and --auto both say the formats"),
        (effective_bits is not None and not auto, "--effective-bits needs --auto"),
        (effective_bits is not None and math.isnan(effective_bits), "--effective-bits is no number"),
        (options["mtp"] and not auto, "--auto-mtp needs --auto"),
        (
            options["calibration"] is not None and options["activation_scales"] is not None and not auto,
            "--activation-scales replaces --calibration",
        ),
        (
            options["save_activation_scales"] is not None and options["calibration"] is None,
            "--save-activation-scales needs --calibration",
        ),
    )
    for refused, message in refusals:
        if refused:
            raise click.UsageError(message)
    return (effective_bits or DEFAULT_BITS) if auto else None
