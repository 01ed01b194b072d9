"""What `n3c check` checks: the spec, the passes over its program, and what the target can do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from n3c.backends.onnx.forms import Form, forms
from n3c.backends.trt.targets import Flavour, lacking, require
from n3c.compiler.report.memory_fit import Room, rooms
from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError
from n3c.ir.types import DType
from n3c.passes.serving import serve
from n3c.specs.load import load_spec
from n3c.specs.schema import Spec


@dataclass(frozen=True, slots=True)
class Checked:
    """A spec that is in order."""

    name: str
    warnings: list[Diagnostic]
    forms: tuple[Form, ...]
    """How TensorRT computes the linears of each entry point; none where that target was not asked for."""
    rooms: tuple[Room, ...]
    """What cards take."""


def check(
    path: Path,
    overrides: Sequence[str],
    *,
    target: str | None,
    sms: Sequence[int],
    flavour: Flavour = "rtx",
    context: int | None = None,
    batch: int = 1,
) -> Checked:
    """Return what there is to say of a spec; N3CError with exit code 3, 4 or 6 for what would fail.

    Without a target all of them are checked. `batch` requests of `context` tokens (serving.max_seq_len) are what
    cards are asked to take.
    """
    spec, warnings = load_spec(path, overrides)
    served = serve(spec)
    if target != "torch":
        require_target(spec, () if target == "onnx" else sms, flavour)
    asked = target in (None, "trt")
    found = forms(served.program, spec.serving.batch_sizes, lacking(sms)) if asked else ()
    fits = rooms(spec, served, context or spec.serving.max_seq_len, batch)
    return Checked(spec.name, [*warnings, *served.warnings], found, fits)


def require_target(spec: Spec, sms: Sequence[int], flavour: Flavour) -> None:
    """Raise N3CError (exit code 4) where an engine cannot hold what the program needs.

    `sms` are GPU architectures; none asks for what holds on every one.
    """
    faults = require(sms, flavour) or list(_cache_faults(spec, sms))
    if faults:
        raise N3CError(faults, ExitCode.TARGET)


def _cache_faults(spec: Spec, sms: Sequence[int]) -> Iterator[Diagnostic]:
    path = "serving.kv_cache_dtype"
    if spec.serving.kv_cache_dtype == "fp8" and spec.attention is not None:
        span, help_ = spec.span(path), f'set {path} = "bf16"'
        if spec.attention.head_dim % 2:
            message = f"a KV cache of fp8 is written two codes at a time, and head_dim is {spec.attention.head_dim}"
            yield Diagnostic("E0508", message, span, help=help_)
        for sm in sms:
            if DType.F8E4M3 in lacking([sm]):
                yield Diagnostic("E0508", f"SM {sm} has no FP8, so no KV cache of fp8", span, help=help_)
