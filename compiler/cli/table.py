"""Plain tables and figures for the terminal."""

from __future__ import annotations

from collections.abc import Sequence


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return aligned columns: the first to the left, the others to the right."""
    table = [tuple(header), *(tuple(row) for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def format_bytes(size: float) -> str:
    """Return a size in decimal units, as disks and memory bandwidths are told: `79.01 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"


def format_count(count: float) -> str:
    """Return a count as the field writes it: `120.67B`."""
    for unit in ("", "K", "M"):
        if count < 1000:
            return f"{count:.2f}{unit}" if unit else f"{count:.0f}"
        count /= 1000
    return f"{count:.2f}B"
