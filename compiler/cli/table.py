"""Plain tables and figures for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from n3c.ir.text import escaped


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return aligned columns: the first to the left, the others to the right; cells stay on their line."""
    table = [tuple(header), *(tuple(map(escaped, row)) for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def format_peak(size: int | None) -> str:
    """Return how the last line of a command goes on about peak memory; empty where the system does not tell it."""
    return "" if size is None else f", peak memory {size / 2**30:.2f} GiB"
