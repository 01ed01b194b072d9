"""The table of GPUs that hold a model."""

from __future__ import annotations

from typing import Any

from n3c.compiler.report.units import format_bytes

from .table import format_table


def format_fits(fits: list[dict[str, Any]]) -> str:
    """Return the table: each size of GPU, and what it holds of the model."""
    rows = [
        (
            fit["gpu"],
            format_bytes(fit["memory_bytes"]),
            ", ".join(fit["trt"]),
            "yes" if fit["fits"] else "no",
            f"{fit['longest_context']:,}",
            "any" if fit["most_requests"] is None else f"{fit['most_requests']:,}",
            str(fit["gpus"]),
        )
        for fit in fits
    ]
    return format_table(("GPU", "memory", "TensorRT", "fits", "context up to", "requests", "GPUs"), rows)
