"""quantize: give each weight its format, by rules over roles and layers.

Pattern: a parameter that ops read as a weight of linears only (`OpDef.weights`). It becomes codes and scales in front
of a `dequantize_*` node; layers whose weights differ in format get functions of their own
(`moe@nvfp4+fp8`). Everything else keeps its stored type. The coverage ledger tells, for every
weight, the rule that decided. q, k and v of a layer have one scale where they have one format. First in the
pipeline: later passes merge and lay out by format.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import ClassVar

from n3c.ir import ops
from n3c.ir.diagnostics import ExitCode, N3CError
from n3c.ir.formats import FORMATS, NVFP4_BLOCK, WeightFormat
from n3c.ir.program import Function, LedgerEntry, Parameter, Program, Value
from n3c.ir.rewrite import Builder
from n3c.ir.source import Fp8, Nvfp4, tensor_names
from n3c.specs.rules import FormatRule, FormatRules, Misfit, misfit_diagnostics


@dataclass(frozen=True, slots=True)
class Quantize:
    """Give each weight the format of the rule that decides it."""

    name: ClassVar[str] = "quantize"

    rules: FormatRules

    def run(self, program: Program) -> bool:
        """Rewrite functions, calls and parameters; N3CError for a rule without effect or a weight that does not fit."""
        linears = linear_parameters(program)
        parameters = program.parameters.values()
        decided = {p.name: self.rules.decide(p, is_linear=p.name in linears) for p in parameters}
        misfits = [misfit for p in parameters if (misfit := _misfit(p, decided[p.name], linears)) is not None]
        faults = [*self.rules.faults(parameters), *misfit_diagnostics(misfits)]
        if faults:
            raise N3CError(faults, ExitCode.SPEC)
        program.ledger = tuple(_entry(p, decided[p.name]) for p in parameters)
        formats = {name: rule for name, rule in decided.items() if rule is not None and _format(rule).quantized}
        if not formats:
            return False
        _rewrite(program, formats)
        return True


def linear_parameters(program: Program) -> set[str]:
    """Return the names of the parameters that are weights of linears, and of nothing else."""
    weights: set[str] = set()
    others: set[str] = set()
    kinds = {name: _weights_of_linears(function) for name, function in program.functions.items()}
    for call in program.calls():
        for kind, actual in zip(kinds[call.function], call.parameters, strict=True):
            if kind is not None:
                (weights if kind else others).add(actual)
    return weights - others


def _weights_of_linears(function: Function) -> list[bool | None]:
    """Return for each formal parameter whether only linears read it, as their weight; None: no node does."""
    kinds: list[bool | None] = []
    for formal in function.parameters:
        readers = [
            name in node.op.weights
            for node in function.uses(formal)
            for name, operand in node.named_operands.items()
            if operand is formal
        ]
        kinds.append(all(readers) if readers else None)
    return kinds


def _format(rule: FormatRule) -> WeightFormat:
    return FORMATS[rule.format]


def _misfit(parameter: Parameter, rule: FormatRule | None, linears: Collection[str]) -> Misfit | None:
    """Return why `parameter` cannot have the format that its rule gives it; None where it can."""
    if rule is None or not _format(rule).quantized:
        return None
    shape = parameter.type.static_dims
    if parameter.name not in linears:
        reason = "it is not the weight of a linear"
        return Misfit(parameter, shape, rule, "E0403", reason, 'its format must be "bf16"', rule.span)
    if _format(rule).divides(shape[-2], shape[-1], rule.block_rows):
        return None
    span = rule.span or parameter.origin.span
    bf16 = f'add a rule with roles = ["{parameter.role}"] and format = "bf16"'
    if shape[-1] % NVFP4_BLOCK:
        reason = f"its input width {shape[-1]} is not a multiple of {NVFP4_BLOCK}"
        return Misfit(parameter, shape, rule, "E0404", reason, bf16, span)
    reason = f"its {shape[-2]} rows do not divide into blocks of {rule.block_rows}"
    return Misfit(parameter, shape, rule, "E0405", reason, f"set block = [1, 16] in the rule, or {bf16}", span)


MERGED = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
"""Roles whose weights have one scale within a layer, where their formats agree: readers merge them into one linear."""


def _scaled_together(program: Program, formats: dict[str, FormatRule]) -> dict[str, tuple[str, ...]]:
    """Return the tensors that have one scale, by the name of each parameter among them."""
    groups: dict[tuple[str, str], dict[str, str]] = {}
    for name, rule in formats.items():
        parameter = program.parameters[name]
        if parameter.role.removeprefix("mtp.") in MERGED:
            (tensor,) = tensor_names(parameter.source)
            layer = tensor.removesuffix(".weight").rpartition(".")[0]
            groups.setdefault((layer, rule.format), {})[name] = tensor
    return {name: tuple(group.values()) for group in groups.values() if len(group) > 1 for name in group}


def _parts(parameter: Parameter, rule: FormatRule, scaled_with: tuple[str, ...]) -> list[Parameter]:
    """Return the parameters that replace `parameter`."""
    format_ = _format(rule)
    return [
        replace(
            parameter,
            name=parameter.name + part.suffix,
            type=part.type(parameter.type),
            source=Nvfp4(parameter.source, part.name, rule.block_rows, scaled_with)
            if format_.blocked
            else Fp8(parameter.source, part.name, scaled_with),
            origin=parameter.origin.by(Quantize.name),
            format=rule.format,
        )
        for part in format_.parts
    ]


def _entry(parameter: Parameter, rule: FormatRule | None) -> LedgerEntry:
    reason = "not a linear" if rule is None else rule.path
    format_, size = parameter.type.dtype.value, parameter.type.bytes
    if rule is not None and _format(rule).quantized:
        format_, size = rule.format, _format(rule).bytes(parameter.type)
    return LedgerEntry(parameter.name, parameter.role, parameter.type.static_dims, reason, format_, size)


def _rewrite(program: Program, formats: dict[str, FormatRule]) -> None:
    together = _scaled_together(program, formats)
    parts = {name: _parts(program.parameters[name], rule, together.get(name, ())) for name, rule in formats.items()}
    variants: dict[tuple[str, tuple[str, ...]], Function] = {}
    for call in program.calls():
        original = program.functions[call.function]
        signature = tuple(formats[name].format if name in formats else "bf16" for name in call.parameters)
        if set(signature) == {"bf16"}:
            continue
        if (call.function, signature) not in variants:
            variant = _variant(original, signature, _fresh(program, call.function, signature))
            variants[call.function, signature] = program.functions[variant.name] = variant
        call.function = variants[call.function, signature].name
        call.parameters = [bound for name in call.parameters for bound in _names(parts, name)]
    used = {call.function for call in program.calls()}
    program.functions = {name: f for name, f in program.functions.items() if name in used}
    program.parameters = {
        part.name: part for name, held in program.parameters.items() for part in parts.get(name, [held])
    }


def _names(parts: dict[str, list[Parameter]], name: str) -> list[str]:
    """Return the names of the parameters that take the place of `name`."""
    return [part.name for part in parts[name]] if name in parts else [name]


def _fresh(program: Program, function: str, signature: tuple[str, ...]) -> str:
    """Name a variant by its formats, `moe@nvfp4+fp8`, with a number where two variants have the same."""
    kinds = sorted({s for s in signature if s != "bf16"}, reverse=True)
    base = candidate = f"{function}@{'+'.join(kinds)}"
    n = 2
    while candidate in program.functions:
        candidate, n = f"{base}.{n}", n + 1
    return candidate


def _variant(original: Function, signature: tuple[str, ...], name: str) -> Function:
    """Return `original` with codes and scales for the formals that `signature` quantizes."""
    function = original.clone(name)
    function.origin = original.origin.by(Quantize.name)
    parameters: list[Value] = []
    for formal, format_ in zip(function.parameters, signature, strict=True):
        if format_ == "bf16":
            parameters.append(formal)
            continue
        stored = FORMATS[format_]
        parts = [Value(formal.name + part.suffix, part.type(formal.type)) for part in stored.parts]
        parameters.extend(parts)
        op = ops.dequantize_nvfp4 if stored.blocked else ops.dequantize_fp8
        short = formal.name.removesuffix(".weight").rpartition(".")[2]
        build = Builder.before(function, function.uses(formal)[0], Quantize.name)
        function.replace(formal, build.emit(op, *parts, name=f"{short}_w"))
    function.parameters = parameters
    return function
