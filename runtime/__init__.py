"""The Python API that runs a build: `load` to generate, `verify` to compare implementations, `bench` to measure."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .benchmark.run import bench as bench
    from .generation.model import load as load
    from .verification.run import verify as verify

__all__ = ["bench", "load", "verify"]

_MODULES = {"bench": "benchmark.run", "load": "generation.model", "verify": "verification.run"}
"""Function → its module."""


def imported(package: str, modules: dict[str, str], name: str) -> object:
    """Import `package`.`modules[name]` and return its `name`; AttributeError for an unknown name."""
    if name not in modules:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{package}.{modules[name]}"), name)


if not TYPE_CHECKING:  # type checkers are to know no other names than those above

    def __getattr__(name: str) -> object:
        return imported(__name__, _MODULES, name)
