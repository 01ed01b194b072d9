"""Figures as people read them: bytes and counts with their units."""

from __future__ import annotations


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


def format_operations(count: float, unit: str = "FLOPs") -> str:
    """Return a count of operations, or with `FLOP/s` their rate: `2.02 PFLOP/s`."""
    for prefix in ("", "k", "M", "G", "T"):
        if count < 1000:
            return f"{count:.3g} {prefix}{unit}"
        count /= 1000
    return f"{count:.3g} P{unit}"


def format_time(microseconds: float) -> str:
    """Return a time in the unit in which it reads best: `15.20 ms`."""
    return f"{microseconds:.1f} us" if microseconds < 1000 else f"{microseconds / 1000:.2f} ms"
