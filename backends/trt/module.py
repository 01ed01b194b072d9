"""The TensorRT module object: `tensorrt_rtx` or `tensorrt`, one API, chosen at run time.

This is the one place that imports either. Both are untyped extension modules, hence `Any`.
"""

from __future__ import annotations

import importlib
from typing import Any

from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError

from .targets import Flavour

_MODULES: dict[Flavour, tuple[str, str, str]] = {
    "rtx": ("tensorrt_rtx", "tensorrt-rtx", "TensorRT-RTX"),
    "full": ("tensorrt", "tensorrt", "TensorRT"),
}


def load_trt(flavour: Flavour = "rtx") -> Any:
    """Return the module of `flavour`; N3CError (E0501) where it is not installed or does not load."""
    module, package, title = _MODULES[flavour]
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        raise N3CError(
            Diagnostic(
                "E0501", f"{title} cannot be imported: {error}", help=f"install it with `pip install {package}`"
            ),
            ExitCode.TARGET,
        ) from error


def flavour_of(trt: Any) -> Flavour:
    """Return which one a module of `load_trt` is."""
    return "full" if trt.__name__ == _MODULES["full"][0] else "rtx"


def version(trt: Any) -> str:
    """Return name and version of a module of `load_trt`, as `tensorrt_rtx 1.7.1.116`."""
    return f"{trt.__name__} {trt.__version__}"
