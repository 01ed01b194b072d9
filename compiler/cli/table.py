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


def format_bytes(size: float) -> str:
    """Return a size in decimal units, as disks and memory bandwidths are told: `79.01 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"


def format_time(microseconds: float) -> str:
    """Return a time in the unit in which it reads best: `15.20 ms`."""
    return f"{microseconds:.1f} us" if microseconds < 1000 else f"{microseconds / 1000:.2f} ms"


def format_peak(size: int | None) -> str:
    """Return how the last line of a command goes on about peak memory; empty where the system does not tell it."""
    return "" if size is None else f", peak memory {size / 2**30:.2f} GiB"


def format_count(count: float) -> str:
    """Return a count as the field writes it: `120.67B`."""
    for unit in ("", "K", "M"):
        if count < 1000:
            return f"{count:.2f}{unit}" if unit else f"{count:.0f}"
        count /= 1000
    return f"{count:.2f}B"
