"""Versions of what a build depends on, without importing any of it."""

from __future__ import annotations

import importlib.metadata
import platform

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
