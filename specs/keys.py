"""How a table of the spec declares its keys: `key(...)`, and the bounds that several keys share.

The maxima are far above any model; they keep sizes, and products of sizes, within what later stages can count.
"""

from __future__ import annotations

from dataclasses import field
from typing import Any

WIDTH = 1 << 20
"""Most channels of anything."""
COUNT = 1 << 16
"""Most heads, experts, groups or prediction steps."""
LAYERS = r"all|[0-9]+|[0-9]+\.\.[0-9]+|first [0-9]+|last [0-9]+|before attention"
"""Selectors of trunk layers."""
MTP_LAYERS = "mtp"
"""The selector of all blocks of multi-token prediction, where a table takes one."""
LENGTH = (1 << 31) - 1
"""Longest sequence, in tokens; positions are 32-bit integers in every backend."""


def key(
    doc: str,
    *,
    default: Any = ...,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    regex: str | None = None,
    choices: tuple[Any, ...] | None = None,
) -> Any:
    """Declare a spec key.

    `minimum` and `maximum` include their value, `above` excludes it; in an array they bound each
    entry, as does `regex`, which must match a whole string. `choices` lists the values allowed.
    """
    metadata = {
        "doc": doc,
        "minimum": minimum,
        "above": above,
        "maximum": maximum,
        "regex": regex,
        "choices": choices,
    }
    if default is ...:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)
