"""Numbers of a request and what they may be."""

from __future__ import annotations

import math

from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError

INT64_MAX = 2**63 - 1


def require_between(name: str, value: float, least: float, most: float = INT64_MAX, *, above: bool = False) -> None:
    """Raise N3CError (E0816, exit code 2) where `value` is no finite number from `least` (`above` it) to `most`."""
    if math.isfinite(value) and (least < value if above else least <= value) and value <= most:
        return
    bounds = f"{'above' if above else 'at least'} {least}, at most {'2^63 - 1' if most == INT64_MAX else most}"
    message = f"`{name}` is {value}, which is no finite number of its range: {bounds}"
    raise N3CError(Diagnostic("E0816", message, help=f"give `{name}` a number in that range"), ExitCode.USAGE)
