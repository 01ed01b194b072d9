"""Peaks of GPUs, by which train.py reports MFU."""

from __future__ import annotations

import re
from collections.abc import Iterator

from n3c.backends.gpus import GPUS

_TRAINERS_ONLY = (
    ("A30", 165.0),
    ("A10", 125.0),
    ("L40", 181.0),
    ("H100 NVL", 835.0),
    ("H100 PCIe", 756.0),
    ("GH200", 989.0),
    ("GB200", 2500.0),
    ("B300", 2250.0),
    ("GB300", 2500.0),
)
"""Cards on which people train, of which nothing else is told."""
_DRIVER_NAMES = {"DGX Spark": "GB10"}


def peak_tflops() -> Iterator[tuple[str, float]]:
    """Yield words of a device's name, and its dense BF16 TFLOP/s with float32 sums; the most words decide."""
    for gpu in GPUS.values():
        name = _DRIVER_NAMES.get(gpu.name, gpu.name)
        yield re.sub(r" (\d+ GB|SXM)", "", name), round(gpu.bf16 / 1e12, 1)
    yield from _TRAINERS_ONLY
