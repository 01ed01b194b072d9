"""What `n3c check` checks: the spec, the passes over its program, and what the target can do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from n3c.backends.trt.targets import require
from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError
from n3c.specs.load import load_spec
from n3c.specs.schema import Spec

from .serving import Served, serve


def check(path: Path, overrides: Sequence[str], *, target: str | None, sm: int) -> tuple[str, list[Diagnostic]]:
    """Return the spec's name and warnings; N3CError with exit code 3, 4 or 6 for what would fail.

    Without a target all of them are checked.
    """
    spec, warnings = load_spec(path, overrides)
    served = serve(spec)
    if target in (None, "trt"):
        require_target(spec, served, sm)
    return spec.name, [*warnings, *served.warnings]


def require_target(spec: Spec, served: Served, sm: int) -> None:
    """Raise N3CError (exit code 4) where the GPU architecture `sm` lacks a format that the program needs."""
    formats = {entry.format for entry in served.program.ledger} | {spec.serving.kv_cache_dtype}
    faults = require(sm, formats)
    if faults:
        raise N3CError(faults, ExitCode.TARGET)
