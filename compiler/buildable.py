"""What `n3c build` can refuse before any work: entry points, stages and weights that do not go together."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError, Span
from n3c.ir.program import Program
from n3c.specs.schema import Spec

from .serving import Served

if TYPE_CHECKING:
    from .driver import Request

BUILDER_COPIES = 3
"""Copies of embedded weights that building a plan holds at once; measured in docs/engine-forms.md."""


def require_request(spec: Spec, served: Served, request: Request) -> None:
    """Raise N3CError for options that do not fit the model (exit code 2) and too large a model (E0513, exit code 4)."""
    faults = list(_usage(spec, served, request))
    if faults:
        raise N3CError(faults, ExitCode.USAGE)
    if request.weights_mode == "embedded" and request.target == "trt":
        require_memory(served.program, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), request.spec)


def _usage(spec: Spec, served: Served, request: Request) -> Iterator[Diagnostic]:
    layers, there = len(spec.model.pattern), list(served.program.entry_points)
    if request.stages > layers:
        yield Diagnostic("E0704", f"--stages {request.stages}: the model has {layers} layers")
    for entry in request.entries:
        if entry not in there:
            yield Diagnostic("E0705", f"--entry {entry}: this model has {', '.join(there)}")
    if request.weights_mode == "embedded" and request.weights is None:
        yield Diagnostic("E0706", "--weights-mode embedded needs the weights", help="add --weights DIR")


def require_memory(program: Program, memory: int, spec: Path) -> None:
    """Raise N3CError (E0513, exit code 4) where building plans with weights inside takes more than `memory` bytes."""
    weights = sum(parameter.type.bytes for parameter in program.memories())
    if BUILDER_COPIES * weights > memory:
        needed = f"{BUILDER_COPIES * weights / 1e9:.1f} GB, {BUILDER_COPIES} times {weights / 1e9:.1f} GB of weights"
        message = f"embedding needs about {needed}; this machine has {memory / 1e9:.1f} GB of memory"
        diagnostic = Diagnostic("E0513", message, Span(str(spec)), help="leave --weights-mode at `bound`")
        raise N3CError(diagnostic, ExitCode.TARGET)
