"""The options of `n3c quantize` for sensitive layers and activations."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from n3c.compiler.quantization.request import Request

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
    click.option("--auto-mtp", is_flag=True, help="Let --auto quantize the MTP block too."),
    click.option("--calibration", type=_PATH, help="Tokens (.npy, .bin) or, where tokens are bytes, text."),
    click.option(
        "--calibration-samples",
        type=click.IntRange(min=1),
        default=128,
        show_default=True,
        help="Sequences to take of it.",
    ),
    click.option(
        "--calibration-length", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens of a sequence."
    ),
    click.option("--activation-scales", type=_PATH, help="Reuse saved activation scales (.json or .safetensors)."),
    click.option("--save-activation-scales", type=_PATH, help="Save the calibrated scales (.json or .safetensors)."),
    click.option("--write-spec", type=_PATH, help="Write the spec with its final rules."),
)


def sensitivity(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options to a command, which gets them as one argument, `request`; refuse what does not go together."""

    @functools.wraps(command)
    def wrapped(
        *arguments: Any,
        like: Path | None,
        auto: bool,
        effective_bits: float | None,
        auto_mtp: bool,
        calibration: Path | None,
        calibration_samples: int,
        calibration_length: int,
        activation_scales: Path | None,
        save_activation_scales: Path | None,
        write_spec: Path | None,
        **others: Any,
    ) -> None:
        refusals = (
            (like is not None and auto, "--like and --auto both say the formats"),
            (effective_bits is not None and not auto, "--effective-bits needs --auto"),
            (effective_bits is not None and math.isnan(effective_bits), "--effective-bits is no number"),
            (auto_mtp and not auto, "--auto-mtp needs --auto"),
            (
                calibration is not None and activation_scales is not None and not auto,
                "--activation-scales replaces --calibration",
            ),
            (
                save_activation_scales is not None and calibration is None,
                "--save-activation-scales needs --calibration",
            ),
        )
        for refused, message in refusals:
            if refused:
                raise click.UsageError(message)
        request = Request(
            like=like,
            effective_bits=(DEFAULT_BITS if effective_bits is None else effective_bits) if auto else None,
            mtp=auto_mtp,
            calibration=calibration,
            samples=calibration_samples,
            length=calibration_length,
            activation_scales=activation_scales,
            save_activation_scales=save_activation_scales,
            write_spec=write_spec,
        )
        command(*arguments, request=request, **others)

    for option in reversed(_OPTIONS):
        wrapped = option(wrapped)
    return wrapped
