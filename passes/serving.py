"""From a spec to the program that is served: lowering and the serving pipeline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from n3c.ir.diagnostics import Diagnostic
from n3c.ir.program import Program
from n3c.ir.types import DType
from n3c.passes.lower.model import lower
from n3c.specs.rules import format_rules
from n3c.specs.schema import Spec

from .base import Pass, PassReport, run_pipeline
from .cleanup import Cleanup
from .fuse_moe import FuseMoe
from .pipelines import SERVING
from .plan_state import PlanState
from .quantize import Quantize
from .state_plan import StatePlan, state_plan
from .training_formats import require_training_rules

STATE_DTYPES = {"fp32": DType.F32, "fp16": DType.F16, "bf16": DType.BF16, "fp8": DType.F8E4M3}


@dataclass(frozen=True, slots=True)
class Served:
    """A program with the entry points of serving, and what the passes said."""

    program: Program
    plan: StatePlan
    reports: list[PassReport]
    warnings: list[Diagnostic]


def quantize_pass(spec: Spec) -> Quantize:
    """Return the pass for the spec's [quantization]; without the table everything stays BF16."""
    return Quantize(format_rules(spec, "quantization"))


def serving_passes(spec: Spec) -> list[Pass]:
    """Return the passes of `SERVING` with the options that `spec` gives them."""
    serving = spec.serving
    made: dict[str, Pass] = {
        "quantize": quantize_pass(spec),
        "fuse_moe": FuseMoe(),
        "plan_state": PlanState(
            max_seq_len=serving.max_seq_len,
            kv_dtype=STATE_DTYPES[serving.kv_cache_dtype],
            ssm_dtype=STATE_DTYPES[serving.ssm_state_dtype],
            conv_dtype=STATE_DTYPES[serving.conv_state_dtype],
            prefill_chunk=serving.prefill_chunk,
            draft_tokens=serving.draft_tokens,
        ),
        "cleanup": Cleanup(),
    }
    return [made[name] for name in SERVING]


def serve(spec: Spec, after: Callable[[str, Program], None] | None = None) -> Served:
    """Lower `spec` and run the serving pipeline; N3CError (exit code 3) where a rule does not fit the model."""
    program = lower(spec)
    if after is not None:
        after("lower", program)
    passes = serving_passes(spec)
    weights = tuple(program.parameters.values())
    warnings = [*format_rules(spec, "quantization").warnings(weights), *require_training_rules(spec, program)]
    reports = run_pipeline(program, passes, after)
    return Served(program, state_plan(program, spec.serving.max_seq_len), reports, warnings)
