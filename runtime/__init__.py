"""What runs a build, as a Python API: `load` to generate with it, `verify` to compare its forms."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .generation.model import load as load
    from .verification.run import verify as verify

__all__ = ["load", "verify"]

_MODULES = {"load": "generation.model", "verify": "verification.run"}
"""Function → its module."""


def __getattr__(name: str) -> object:
    """Import a function of the API when it is first asked for."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    function = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = function
    return function
