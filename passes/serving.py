"""From a spec to the program that is served: lowering and the serving pipeline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from n3c.ir.diagnostics import Diagnostic
from n3c.ir.program import Program
from n3c.ir.types import DType
from n3c.passes.lower.model import lower
from n3c.specs.pattern import Pattern
from n3c.specs.roles import select_layers
from n3c.specs.schema import Rule, Spec

from .base import Pass, PassReport, run_pipeline
from .cleanup import Cleanup
from .fuse_moe import FuseMoe
from .pipelines import SERVING
from .plan_state import PlanState
from .quantize import FormatRule, Quantize, ledger_warnings
from .state_plan import StatePlan, state_plan

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
    table = spec.quantization
    if table is None:
        return Quantize(FormatRule("no [quantization]", "bf16", 16))
    default = FormatRule("quantization.format", table.format, table.block[0], span=spec.span("quantization.format"))
    rules = (_rule(i, rule, table.block, spec) for i, rule in enumerate(table.rules))
    return Quantize(default, tuple(rules))


def _rule(index: int, rule: Rule, block: tuple[int, int], spec: Spec) -> FormatRule:
    path = f"quantization.rules.{index}"
    return FormatRule(
        path=path,
        format=rule.format,
        block_rows=(rule.block or block)[0],
        roles=rule.roles,
        layers=_layers(rule.layers, spec.model.pattern),
        modules=rule.modules,
        span=spec.span(path),
    )


def _layers(selector: str, pattern: Pattern) -> frozenset[int] | None:
    return None if selector == "all" else select_layers(selector, pattern)


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
    warnings = ledger_warnings(quantize_pass(spec).rules, program)
    reports = run_pipeline(program, passes, after)
    return Served(program, state_plan(program, spec.serving.max_seq_len), reports, warnings)
