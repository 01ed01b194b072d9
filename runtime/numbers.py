"""Bounds of numbers that a user gives."""

from __future__ import annotations

import math

from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError

INT64_MAX = 2**63 - 1
"""The largest whole number that is taken where nothing names a smaller one."""


def out_of_range(
    value: float, *, least: float | None = None, above: float | None = None, most: float | None = None
) -> str | None:
    """Return why `value` is not a finite number within the bounds, or None where it is."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value} is not a finite number"
    if least is not None and value < least:
        return f"{value} is less than {least:g}"
    if above is not None and value <= above:
        return f"{value} is not more than {above:g}"
    most = INT64_MAX if most is None and isinstance(value, int) else most
    if most is not None and value > most:
        return f"{value} is more than {'2^63 - 1' if most == INT64_MAX else f'{most:g}'}"
    return None


def require_number(
    name: str, value: float, *, least: float | None = None, above: float | None = None, most: float | None = None
) -> None:
    """Raise N3CError (E0816, exit code 2) where `value` is not a finite number within the bounds."""
    problem = out_of_range(value, least=least, above=above, most=most)
    if problem is not None:
        help_ = f"give `{name}` a number in its range"
        raise N3CError(Diagnostic("E0816", f"`{name}`: {problem}", help=help_), ExitCode.USAGE)
