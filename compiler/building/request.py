"""A request to build a spec, and the checks that refuse one before any work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from n3c.backends.machine import memory_bytes
from n3c.backends.progress import Progress
from n3c.backends.trt.builder_memory import BUILDER_COPIES
from n3c.backends.trt.targets import Flavour
from n3c.compiler.common_options import Target
from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError, Span
from n3c.ir.program import Program
from n3c.passes.serving import Served
from n3c.specs.schema import Spec

Entry = Literal["prefill", "decode", "verify", "draft"]
WeightsMode = Literal["bound", "embedded"]


@dataclass(frozen=True, slots=True)
class Request:
    """What to build from a spec, and how."""

    target: Target
    weights: Path | None = None
    trt: Flavour = "rtx"
    sms: tuple[int, ...] = ()
    """GPU architectures that each plan is for; none for graphs."""
    stages: int = 1
    """Plans that an entry point is cut into, at layer boundaries."""
    entries: Sequence[Entry] = ()
    """Entry points to build; none means all that the model has."""
    weights_mode: WeightsMode = "bound"


@dataclass(frozen=True, slots=True)
class Job:
    """A running build: its request, the compiled spec, and the folder that it writes to."""

    request: Request
    spec: Spec
    spec_sha256: str
    served: Served
    folder: Path
    progress: Progress
    builders: int | None = None
    """Processes that build plans at once; None: as many as cores and memory allow."""
    cache_bytes: int = 0
    """How large the cache of plans may become; 0: none is asked."""


def require_request(spec: Spec, served: Served, request: Request) -> None:
    """Raise N3CError for options that do not fit the model (exit code 2) and too large a model (E0513, exit code 4)."""
    faults = list(_usage(spec, served, request))
    if faults:
        raise N3CError(faults, ExitCode.USAGE)
    if request.weights_mode == "embedded" and request.target == "trt":
        memory = memory_bytes()
        if memory is not None:
            require_memory(served.program, memory, spec.span("model"))


def _usage(spec: Spec, served: Served, request: Request) -> Iterator[Diagnostic]:
    layers, there = len(spec.model.pattern), list(served.program.entry_points)
    if request.stages > layers:
        yield Diagnostic("E0704", f"--stages {request.stages}: the model has {layers} layers")
    for entry in request.entries:
        if entry not in there:
            yield Diagnostic("E0705", f"--entry {entry}: this model has {', '.join(there)}")
    if request.weights_mode == "embedded" and request.weights is None:
        yield Diagnostic("E0706", "--weights-mode embedded needs the weights", help="add --weights DIR")


def require_memory(program: Program, memory: int, span: Span | None) -> None:
    """Raise N3CError (E0513, exit code 4) where building plans with weights inside takes more than `memory` bytes."""
    weights = sum(parameter.type.bytes for parameter in program.parameters.values())
    if BUILDER_COPIES * weights > memory:
        needed = f"{BUILDER_COPIES * weights / 1e9:.1f} GB, {BUILDER_COPIES} times {weights / 1e9:.1f} GB of weights"
        message = f"embedding needs about {needed}; this machine has {memory / 1e9:.1f} GB of memory"
        diagnostic = Diagnostic("E0513", message, span, help="leave --weights-mode at `bound`")
        raise N3CError(diagnostic, ExitCode.TARGET)
