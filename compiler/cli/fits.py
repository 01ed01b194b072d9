"""The table of what fits where."""

from __future__ import annotations

from typing import Any

from .table import format_table


def format_fits(fits: list[dict[str, Any]]) -> str:
    """Lay out what each size of card takes."""
    rows = [
        (
            f"{room['gpu_gb']} GB ({room['cards']})",
            "yes" if room["fits"] else "no",
            f"{room['longest_context']:,}",
            "any" if room["most_requests"] is None else f"{room['most_requests']:,}",
            str(room["gpus"]),
        )
        for room in fits
    ]
    return format_table(("GPU", "fits", "longest context", "most requests", "GPUs needed"), rows)
