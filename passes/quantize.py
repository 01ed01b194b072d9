"""quantize: give each weight its format, by rules over roles and layers.

Pattern: a parameter that ops read as a weight of linears only (`OpDef.weights`). It becomes codes and scales in front
of a `dequantize_*` node; layers whose weights differ in format get functions of their own
(`moe@nvfp4+fp8`). Everything else keeps its stored type. The coverage ledger tells, for every
weight, the rule that decided. First in the pipeline: later passes merge and lay out by format.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import ClassVar

from n3c.ir import ops
from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError, Severity, Span
from n3c.ir.program import Call, Function, LedgerEntry, Parameter, Program, Value
from n3c.ir.rewrite import Builder
from n3c.ir.source import Fp8, Nvfp4
from n3c.ir.types import DType, TensorType

NVFP4_FORMATS = ("nvfp4", "w4a16_nvfp4")


@dataclass(frozen=True, slots=True)
class FormatRule:
    """A rule of the spec with its layers resolved."""

    path: str
    """`quantization.rules.2`, or `quantization.format` for the default."""
    format: str
    block_rows: int
    """Rows of an NVFP4 weight block: 16 or 1."""
    roles: tuple[str, ...] = ()
    layers: frozenset[int] | None = None
    """None: all, and what is in no layer."""
    modules: tuple[str, ...] = ()
    span: Span | None = None

    def matches(self, parameter: Parameter) -> bool:
        """Whether the rule selects `parameter`."""
        if self.modules:
            return any(_names(module, parameter) for module in self.modules)
        if self.layers is not None and parameter.layer not in self.layers:
            return False
        return any(fnmatchcase(parameter.role, role) for role in self.roles)

    def insists(self, parameter: Parameter) -> bool:
        """Whether the rule names `parameter` itself rather than by a wildcard."""
        return bool(self.modules) or parameter.role in self.roles


def _names(module: str, parameter: Parameter) -> bool:
    """Whether `module` is the parameter's module; `….mixer.experts` names all routed experts of a layer."""
    return parameter.name.removesuffix(".weight") == module or parameter.name.startswith(f"{module}.*.")


@dataclass(frozen=True, slots=True)
class Quantize:
    """Apply `default` and then `rules`, of which the last that matches decides."""

    name: ClassVar[str] = "quantize"

    default: FormatRule
    rules: tuple[FormatRule, ...] = ()

    def run(self, program: Program) -> bool:
        """Rewrite functions, calls and parameters; N3CError for a rule without effect or a weight that does not fit."""
        linears = linear_parameters(program)
        decided = {p.name: self._decide(p, p.name in linears) for p in program.parameters.values()}
        faults = [*self._unmatched(program), *_misfits(program, decided)]
        if faults:
            raise N3CError(faults, ExitCode.SPEC)
        program.ledger = tuple(_entry(p, *decided[p.name]) for p in program.parameters.values())
        formats = {name: rule for name, (rule, _) in decided.items() if rule is not None and rule.format != "bf16"}
        if not formats:
            return False
        _rewrite(program, formats)
        return True

    def _decide(self, parameter: Parameter, is_linear: bool) -> tuple[FormatRule | None, str]:
        """Return the deciding rule (None: keeps its stored type) and what the ledger says of it."""
        rule = self.default if is_linear else None
        for candidate in self.rules:
            if candidate.matches(parameter):
                rule = candidate
        if rule is None:
            return None, "not a linear"
        if not is_linear and not rule.insists(parameter):
            return None, "not a linear"
        return rule, rule.path

    def _unmatched(self, program: Program) -> Iterator[Diagnostic]:
        for rule in self.rules:
            if not any(rule.matches(parameter) for parameter in program.parameters.values()):
                what = f"modules {list(rule.modules)}" if rule.modules else f"roles {list(rule.roles)}"
                yield Diagnostic(
                    "E0401",
                    f"rule `{rule.path}` matches no weight: {what}"
                    + (" in these layers" if rule.layers is not None else ""),
                    rule.span,
                    help="remove the rule, or name roles and layers that this model has (`n3c inspect` lists them)",
                )


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
    """Return for each formal parameter whether only linears read it, as their weight; None: nobody reads it."""
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


def ledger_warnings(rules: tuple[FormatRule, ...], program: Program) -> list[Diagnostic]:
    """Return a warning for each role of a rule that names nothing in this model."""
    roles = {parameter.role for parameter in program.parameters.values()}
    return [
        Diagnostic(
            "W0402", f"role `{role}` of rule `{rule.path}` names nothing in this model", rule.span, Severity.WARNING
        )
        for rule in rules
        for role in rule.roles
        if not any(fnmatchcase(known, role) for known in roles)
    ]


def _misfits(program: Program, decided: dict[str, tuple[FormatRule | None, str]]) -> Iterator[Diagnostic]:
    """Yield what cannot be done; weights of one role and shape are reported once."""
    linears = linear_parameters(program)
    seen: set[tuple[str, tuple[int, ...]]] = set()
    for parameter in program.parameters.values():
        rule, _ = decided[parameter.name]
        shape = parameter.type.static_dims
        if rule is None or rule.format == "bf16" or (parameter.role, shape) in seen:
            continue
        seen.add((parameter.role, shape))
        where = f"`{parameter.name}` {list(shape)} cannot be {rule.format} by `{rule.path}`"
        bf16 = f'add a rule with roles = ["{parameter.role}"] and format = "bf16"'
        if parameter.name not in linears:
            yield Diagnostic(
                "E0403", f"{where}: it is not the weight of a linear", rule.span, help='its format must be "bf16"'
            )
        elif rule.format in NVFP4_FORMATS and shape[-1] % ops.NVFP4_BLOCK:
            yield Diagnostic(
                "E0404",
                f"{where}: its input width {shape[-1]} is not a multiple of {ops.NVFP4_BLOCK}",
                rule.span or parameter.origin.span,
                help=bf16,
            )
        elif rule.format in NVFP4_FORMATS and shape[-2] % rule.block_rows:
            yield Diagnostic(
                "E0405",
                f"{where}: its {shape[-2]} rows do not divide into blocks of {rule.block_rows}",
                rule.span or parameter.origin.span,
                help=f"set block = [1, 16] in the rule, or {bf16}",
            )


def _stored(type_: TensorType, format_: str) -> list[tuple[str, str, TensorType]]:
    """Return how a weight is stored: (part, suffix of its name as ModelOpt writes it, type), the codes first."""
    scales = TensorType(DType.F32, type_.dims[:-2])
    if format_ == "fp8":
        return [("codes", "", type_.with_dtype(DType.F8E4M3)), ("scale", "_scale", scales)]
    blocks = TensorType(DType.F8E4M3, (*type_.dims[:-1], type_.static_dims[-1] // ops.NVFP4_BLOCK))
    codes = type_.with_dtype(DType.F4E2M1)
    return [("codes", "", codes), ("scale", "_scale", blocks), ("scale_2", "_scale_2", scales)]


def _parts(parameter: Parameter, rule: FormatRule) -> list[Parameter]:
    """Return the parameters that replace `parameter`."""
    origin = parameter.origin.by(Quantize.name)
    return [
        replace(
            parameter,
            name=parameter.name + suffix,
            type=type_,
            source=Fp8(parameter.source, part)
            if rule.format == "fp8"
            else Nvfp4(parameter.source, part, rule.block_rows),
            origin=origin,
            format=rule.format,
        )
        for part, suffix, type_ in _stored(parameter.type, rule.format)
    ]


def _entry(parameter: Parameter, rule: FormatRule | None, reason: str) -> LedgerEntry:
    quantized = rule is not None and rule.format != "bf16"
    format_ = rule.format if rule is not None and quantized else parameter.type.dtype.value
    stored = [type_ for _, _, type_ in _stored(parameter.type, format_)] if quantized else [parameter.type]
    size = sum(type_.bytes for type_ in stored)
    return LedgerEntry(parameter.name, parameter.role, parameter.type.static_dims, reason, format_, size)


def _rewrite(program: Program, formats: dict[str, FormatRule]) -> None:
    variants: dict[tuple[str, tuple[str, ...]], Function] = {}
    for call in program.calls():
        original = program.functions[call.function]
        signature = tuple(formats[name].format if name in formats else "bf16" for name in call.parameters)
        bound = _bound(program, call, formats)
        if set(signature) != {"bf16"}:
            if (call.function, signature) not in variants:
                variant = _variant(original, signature, _fresh(program, call.function, signature))
                variants[call.function, signature] = program.functions[variant.name] = variant
            call.function = variants[call.function, signature].name
        call.parameters = bound
    used = {call.function for call in program.calls()}
    program.functions = {name: f for name, f in program.functions.items() if name in used}
    parameters: dict[str, Parameter] = {}
    for parameter in program.parameters.values():
        rule = formats.get(parameter.name)
        for part in _parts(parameter, rule) if rule else [parameter]:
            parameters[part.name] = part
    program.parameters = parameters


def _bound(program: Program, call: Call, formats: dict[str, FormatRule]) -> list[str]:
    names: list[str] = []
    for name in call.parameters:
        rule = formats.get(name)
        names.extend(part.name for part in _parts(program.parameters[name], rule)) if rule else names.append(name)
    return names


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
        parts = [Value(formal.name + suffix, type_) for _, suffix, type_ in _stored(formal.type, format_)]
        parameters.extend(parts)
        op = ops.dequantize_nvfp4 if format_ in NVFP4_FORMATS else ops.dequantize_fp8
        short = formal.name.removesuffix(".weight").rpartition(".")[2]
        build = Builder.before(function, function.uses(formal)[0], Quantize.name)
        function.replace(formal, build.emit(op, *parts, name=f"{short}_w"))
    function.parameters = parameters
    return function
