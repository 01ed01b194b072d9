"""What `n3c build` is asked for, and what it refuses before any work."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from n3c.backends.trt.targets import Flavour
from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError, Span
from n3c.ir.program import Program
from n3c.passes.serving import Served
from n3c.specs.schema import Spec

BUILDER_COPIES = 3
"""Copies of embedded weights that building a plan holds at once; measured in docs/engine-forms.md."""


TARGETS = ("torch", "onnx", "trt")


@dataclass(frozen=True, slots=True)
class Request:
    """What to build."""

    spec: Path
    target: str
    out: Path | None = None
    overrides: Sequence[str] = ()
    weights: Path | None = None
    trt: Flavour = "rtx"
    sms: tuple[int, ...] = (120,)
    """GPU architectures that each plan is for."""
    stages: int = 1
    """Plans that an entry point is cut into, at layer boundaries."""
    entries: tuple[str, ...] = ()
    """Entry points to build; none means all that the model has."""
    weights_mode: Literal["bound", "embedded"] = "bound"


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
