"""What `n3c check` checks: the spec, the passes over its program, and what the target can do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from n3c.backends.trt.targets import require
from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError, Span
from n3c.specs.load import load_spec
from n3c.specs.schema import Spec

from .serving import Served, serve


def check(path: Path, overrides: Sequence[str], *, target: str | None, sm: int) -> tuple[str, list[Diagnostic]]:
    """Return the spec's name and warnings; N3CError with exit code 3, 4 or 6 for what would fail.

    Without a target all of them are checked.
    """
    spec, warnings = load_spec(path, overrides)
    served = serve(spec)
    if target != "torch":
        require_target(spec, served, None if target == "onnx" else sm)
    return spec.name, [*warnings, *served.warnings]


def require_target(spec: Spec, served: Served, sm: int | None) -> None:
    """Raise N3CError (exit code 4) where an engine cannot hold what the program needs.

    `sm` is the GPU architecture, None for what holds on every one.
    """
    faults = list(_cache_faults(spec))
    if sm is not None:
        asked = _formats(spec, served)
        faults += require(sm, ()) or [fault for name, span in asked.items() for fault in require(sm, [name], span)]
    if faults:
        raise N3CError(faults, ExitCode.TARGET)


def _cache_faults(spec: Spec) -> Iterator[Diagnostic]:
    path = "serving.kv_cache_dtype"
    if spec.serving.kv_cache_dtype == "fp8" and spec.attention is not None:
        message = "TensorRT updates no KV cache of fp8 in place"
        yield Diagnostic("E0508", message, spec.span(path), help=f'set {path} = "bf16"')


def _formats(spec: Spec, served: Served) -> dict[str, Span | None]:
    """Return the formats of the weights, each with the place in the spec that first asks for it."""
    found: dict[str, Span | None] = {}
    for entry in served.program.ledger:
        if entry.format not in found:
            found[entry.format] = spec.span(f"{entry.rule}.format") or spec.span(entry.rule)
    return found
