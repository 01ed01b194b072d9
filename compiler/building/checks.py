"""Checking a spec: the spec itself, the passes over its program, and what the target can do."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from n3c.backends.trt.targets import Flavour, lacking, require, served_gpus, sm_versions, unpublished
from n3c.compiler.common_options import BATCH, CONTEXT, MEMORY, SET, SM, SPEC, TRT, Target
from n3c.compiler.report.cost import layer_counts
from n3c.compiler.report.memory_fit import MemoryFit, memory_fits, memory_of
from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError
from n3c.ir.types import DType
from n3c.passes.serving import Served, serve
from n3c.runtime.options import Option, checked
from n3c.specs.load import loaded
from n3c.specs.schema import Spec

if TYPE_CHECKING:
    from n3c.backends.onnx.forms import Form


@dataclass(frozen=True, slots=True)
class Checked:
    """A spec without errors, with its program of serving."""

    spec: Spec
    served: Served
    sms: tuple[int, ...]
    target: Target | None
    fits: tuple[MemoryFit, ...]
    """Which GPUs hold the model."""
    warnings: tuple[Diagnostic, ...]

    def forms(self) -> "tuple[Form, ...]":
        """Return how TensorRT computes the linears of each entry point; nothing where another target was asked for."""
        from n3c.backends.onnx.entry_forms import fastest_for
        from n3c.backends.onnx.forms import forms

        if self.target not in (None, "trt"):
            return ()
        types = lacking(self.sms)
        program = (serve(self.spec, lacking=types) if types else self.served).program
        return forms(program, self.spec.serving.batch_sizes, types, fastest_for(program, self.sms))

    def as_json(self) -> dict[str, Any]:
        """Return the form of `n3c check --json`."""
        return {
            "ok": True,
            "name": self.spec.name,
            "layers": layer_counts(self.spec),
            "sms": list(self.sms),
            "forms": [form.as_json() for form in self.forms()],
            "fits": [fit.as_json() for fit in self.fits],
            "diagnostics": [warning.as_json() for warning in self.warnings],
        }


@checked
def check(
    spec: Annotated[Path | str | Spec, SPEC],
    *,
    target: Annotated[Target | None, Option("Check for this target only.")] = None,
    sm: Annotated[int | str | Sequence[int], SM] = 120,
    trt: Annotated[Flavour, TRT] = "rtx",
    context: Annotated[int | None, CONTEXT] = None,
    batch: Annotated[int, BATCH] = 1,
    memory: Annotated[int | str | None, MEMORY] = None,
    set: Annotated[Sequence[str], SET] = (),
) -> Checked:
    """Check a spec, and return it with its program; N3CError (exit code 3, 4 or 6) for what would fail later.

    Without a target all of them are checked. `fits` tells which GPUs hold `batch` requests of `context` tokens
    (serving.max_seq_len): those of `sm` that `trt` serves, every one for another target, or one of `memory`.
    """
    sms, size = sm_versions(sm), memory_of(memory)
    read, warnings = loaded(spec, set)
    served = serve(read)
    if target != "torch":
        require_target(read, () if target == "onnx" else sms, trt)
    for_plans = target in (None, "trt")
    gpus, notes = (served_gpus(sms, trt), unpublished(sms, trt)) if for_plans else (served_gpus(), [])
    fits = memory_fits(read, served, context or read.serving.max_seq_len, batch, gpus, size)
    return Checked(read, served, sms, target, fits, (*warnings, *served.warnings, *notes))


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
