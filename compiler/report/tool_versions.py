"""Versions of what a build depends on, without importing any of it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import resource
import sys
from pathlib import Path

PACKAGES = ("n3c", "torch", "onnx", "onnx-ir", "tensorrt-rtx", "tensorrt", "numpy", "safetensors")


def version(package: str) -> str | None:
    """Return the installed version of `package`, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def tool_versions() -> dict[str, str]:
    """Return Python's version and those of the installed packages that shape a build."""
    found = {package: version(package) for package in PACKAGES}
    return {"python": platform.python_version(), **{name: v for name, v in found.items() if v is not None}}


def peak_rss_bytes() -> int:
    """Return the most memory that this process has held."""
    with contextlib.suppress(OSError, StopIteration):  # getrusage also counts what its parent held before exec
        status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return int(next(line for line in status if line.startswith("VmHWM:")).split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere
