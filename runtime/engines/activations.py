"""Which activations an engine rounds with the weights at hand: those of a checkpoint that was not calibrated, none."""

from __future__ import annotations

from dataclasses import replace

from n3c.backends.safetensors.checkpoint import Checkpoint
from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError, Span
from n3c.ir.formats import INPUT_SCALE
from n3c.ir.program import Program
from n3c.ir.source import InputScale
from n3c.specs.schema import Spec


def with_scales_of(spec: Spec, program: Program, checkpoint: Checkpoint) -> Spec:
    """Return `spec`, weight-only where `checkpoint` has no `input_scale` of an NVFP4 linear that `program` rounds.

    Such a checkpoint says of itself that it is W4A16, and other readers take it as that.
    """
    scales = [p for p in program.parameters.values() if isinstance(p.source, InputScale)]
    for parameter in scales:
        weight = program.parameters.get(parameter.name.removesuffix(INPUT_SCALE) + ".weight")
        nvfp4 = weight is not None and weight.format == "nvfp4"
        if nvfp4 and isinstance(parameter.source, InputScale) and parameter.source.names[0] not in checkpoint:
            return replace(spec, serving=replace(spec.serving, activations="weight_only"))
    return spec


def require_scales(spec: Spec, program: Program, checkpoint: Checkpoint) -> None:
    """Raise N3CError (E0818, exit code 6) where an engine of `program` wants scales that `checkpoint` has not."""
    if with_scales_of(spec, program, checkpoint) is not spec:
        message = "this checkpoint has no activation scales (input_scale), with which NVFP4 is computed here"
        help_ = 'calibrate it (`n3c quantize --calibrate`), or build with --set serving.activations="weight_only"'
        raise N3CError(Diagnostic("E0818", message, Span(str(checkpoint.directory)), help=help_), ExitCode.FILE)
