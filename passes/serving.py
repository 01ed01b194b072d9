"""`serve` makes the program of serving from a spec: lowering, then the serving pipeline."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from n3c.ir.diagnostics import Diagnostic
from n3c.ir.program import Program
from n3c.ir.types import DType
from n3c.passes.lower.model import lower
from n3c.specs.rules import format_rules
from n3c.specs.schema import Spec

from .base import PassReport, run_pipeline
from .pipelines import ELSEWHERE, serving_passes
from .state_layout import StatePlan, state_plan
from .training_formats import require_training_rules


@dataclass(frozen=True, slots=True)
class Served:
    """A program with the entry points of serving, its state plan, and the reports of the passes."""

    program: Program
    plan: StatePlan
    reports: list[PassReport]
    warnings: list[Diagnostic]


def serve(
    spec: Spec,
    after: Callable[[str, Program], None] | None = None,
    *,
    lacking: Collection[DType] = (),
    lowered: Program | None = None,
) -> Served:
    """Lower `spec` and run the serving pipeline, for a target that lacks the types `lacking`.

    `lowered` is the program of `spec`, where the caller has lowered it; the passes rewrite it. N3CError (exit code 3)
    where a rule does not fit the model.
    """
    program = lower(spec) if lowered is None else lowered
    if after is not None:
        after("lower", program)
    weights = tuple(program.parameters.values())
    warnings = [*format_rules(spec, "quantization").warnings(weights), *require_training_rules(spec, program)]
    reports = run_pipeline(program, serving_passes(spec, lacking), after)
    if after is not None:
        for pass_ in ELSEWHERE:
            run_pipeline(program.extract(*program.entry_points.values()), [pass_()], after)
    return Served(program, state_plan(program, spec.serving.max_seq_len), reports, warnings)
