"""Processes of this machine, by what Linux tells of them."""

from __future__ import annotations

import contextlib
from pathlib import Path


def _state_and_parent(pid: int) -> tuple[str, int] | None:
    with contextlib.suppress(OSError):
        state, parent = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[:2]
        return state, int(parent)
    return None


def alive(pid: int) -> bool:
    """Whether a process is there, and is not only waited for by its parent."""
    found = _state_and_parent(pid)
    return found is not None and found[0] != "Z"


def children(pid: int) -> list[int]:
    """Return the processes that a process has started."""
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return [child for child in pids if (found := _state_and_parent(child)) is not None and found[1] == pid]
