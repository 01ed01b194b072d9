"""Whether two plans are the same but for the order in which the builder wrote their records."""

from __future__ import annotations

import mmap
import re
from collections import Counter
from pathlib import Path

import numpy as np

_NAME = re.compile(rb"[\w.*+/-]{12,200}", re.ASCII)
"""What a tensor or a kernel is called in a plan."""
_PIECE = 1 << 24


def same_but_for_order(plan: Path, other: Path) -> bool:
    """Whether two plans have the same records, possibly in another order.

    TensorRT-RTX writes the table of a plan's tensors in another order in every process, and all else alike. Told by
    size, names, and how often each byte occurs; which kernels are in a plan is what `audit.json` lists. OSError where
    one cannot be read.
    """
    if plan.stat().st_size != other.stat().st_size:
        return False
    (counts, names), (other_counts, other_names) = _content(plan), _content(other)
    return counts == other_counts and names == other_names


def _content(plan: Path) -> tuple[list[int], Counter[bytes]]:
    """Return how often each byte occurs in a plan, and each name; held in memory are the names alone."""
    counts = np.zeros(256, np.int64)
    with plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        names = Counter(match.group() for match in _NAME.finditer(content))
        while piece := file.read(_PIECE):
            counts += np.bincount(np.frombuffer(piece, np.uint8), minlength=256)
    return counts.tolist(), names
