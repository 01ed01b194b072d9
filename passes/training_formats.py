"""The format of each linear in training, by the rules of [training]."""

from __future__ import annotations

from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError
from n3c.ir.program import Parameter, Program
from n3c.specs.roles import ROUTERS
from n3c.specs.rules import FormatRule, Misfit, format_rules, misfit_diagnostics
from n3c.specs.schema import Spec

from .quantize import linear_parameters


def low_precision(spec: Spec, program: Program) -> list[tuple[Parameter, FormatRule]]:
    """Return each weight that trains in another format than BF16 and the rule that says so.

    `program` is `spec` after lowering. Weights that no linear multiplies with, and routers, which train in
    float32, are among them only where a rule names them: `require_training_rules` refuses those.
    """
    rules, linears = format_rules(spec, "training"), linear_parameters(program)
    found: list[tuple[Parameter, FormatRule]] = []
    for weight in program.parameters.values():
        rule = rules.decide(weight, is_linear=weight.name in linears)
        if rule is None or rule.format == "bf16" or (weight.role in ROUTERS and not rule.names(weight)):
            continue
        found.append((weight, rule))
    return found


def require_training_rules(spec: Spec, program: Program) -> list[Diagnostic]:
    """Return the warnings about [training]; N3CError (exit code 3) for its rules that no model can follow."""
    rules, linears = format_rules(spec, "training"), linear_parameters(program)
    weights = tuple(program.parameters.values())
    misfits = [
        Misfit(weight, weight.type.static_dims, rule, "E0403", reason, 'its format must be "bf16"', rule.span)
        for weight, rule in low_precision(spec, program)
        if (reason := _reason(weight, weight.name in linears))
    ]
    faults = [*rules.faults(weights), *misfit_diagnostics(misfits)]
    if faults:
        raise N3CError(faults, ExitCode.SPEC)
    return rules.warnings(weights)


def _reason(weight: Parameter, is_linear: bool) -> str:
    if not is_linear:
        return "it is not the weight of a linear"
    return "a router trains in float32" if weight.role in ROUTERS else ""
