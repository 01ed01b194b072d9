"""The compiler, as a Python API: each function is what the command of its name does.

They take paths or loaded specs, raise `n3c.ir.diagnostics.N3CError`, print nothing, and return frozen dataclasses
whose `as_json()` is what the command prints with `--json`. Importing this loads none of them: that happens on use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from n3c.runtime import imported

if TYPE_CHECKING:
    from .building.checks import check as check
    from .building.driver import build as build
    from .building.reproduction import repro as repro
    from .configs import export_config as export_config
    from .configs import import_config as import_config
    from .quantization.api import quantize as quantize
    from .report.capacity import simulate as simulate
    from .report.comparison import diff as diff
    from .report.inspection import inspect as inspect

    __version__: str

__all__ = [
    "__version__",
    "build",
    "check",
    "diff",
    "export_config",
    "import_config",
    "inspect",
    "quantize",
    "repro",
    "simulate",
]

_MODULES = {
    "build": "building.driver",
    "check": "building.checks",
    "diff": "report.comparison",
    "export_config": "configs",
    "import_config": "configs",
    "inspect": "report.inspection",
    "quantize": "quantization.api",
    "repro": "building.reproduction",
    "simulate": "report.capacity",
}
"""Function → its module."""


if not TYPE_CHECKING:  # type checkers are to know no other names than those above

    def __getattr__(name: str) -> object:
        if name == "__version__":
            from importlib.metadata import version

            return version("n3c")
        return imported(__name__, _MODULES, name)
