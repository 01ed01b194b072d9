"""Units of the choice of formats: linears that must share one, with what each format costs them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from n3c.ir import ops
from n3c.ir.formats import FORMATS
from n3c.ir.program import Parameter, Program
from n3c.ir.source import Stack, tensor_names
from n3c.passes.lower.model import lower
from n3c.passes.quantize import linear_parameters
from n3c.specs.roles import ROUTERS
from n3c.specs.schema import Spec

_TOGETHER = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True, slots=True)
class Linear:
    """One linear of the model, or one projection of all routed experts of a layer."""

    module: str
    """Its name in the checkpoint, `….experts.*.up_proj` for routed experts."""
    role: str
    shape: tuple[int, int]
    """Rows and columns of one matrix."""
    tensors: tuple[str, ...]
    """The checkpoint tensors, one or one for each expert."""
    input_norm: str | None
    """The tensor of norm weights [K] whose output the linear reads, where it reads one."""

    @property
    def weights(self) -> int:
        """How many weights it has."""
        return prod(self.shape) * len(self.tensors)


@dataclass(frozen=True, slots=True)
class Unit:
    """Linears that get one format: q, k and v of a layer; its routed experts; else one linear."""

    name: str
    linears: tuple[Linear, ...]
    formats: tuple[str, ...]
    """The formats that all of them can have, the cheapest first."""

    @property
    def weights(self) -> int:
        """How many weights it has."""
        return sum(linear.weights for linear in self.linears)

    def bits(self, format_: str) -> float:
        """Return the bits that its weights take in a format."""
        return FORMATS[format_].bits * self.weights


def find_linears(spec: Spec) -> Iterator[Linear]:
    """Yield every linear of the model, in the order of the layers."""
    program = lower(spec)
    norms = _input_norms(program)
    weights = linear_parameters(program)
    for parameter in program.parameters.values():
        if parameter.name in weights:
            yield _linear(parameter, norms.get(parameter.name))


def _linear(parameter: Parameter, norm: str | None) -> Linear:
    shape = parameter.type.static_dims
    module = parameter.name.removesuffix(".weight")
    if isinstance(parameter.source, Stack):
        module = parameter.source.pattern.removesuffix(".weight")
    return Linear(module, parameter.role, (shape[-2], shape[-1]), tuple(tensor_names(parameter.source)), norm)


def find_units(spec: Spec, four_bit: str, block_rows: int, *, mtp: bool) -> list[Unit]:
    """Return what formats can be chosen for, in the order of the layers; the MTP block only where `mtp` says so.

    `four_bit` is `nvfp4` or `w4a16_nvfp4`. A weight that its blocks of `block_rows` x 16 do not
    divide has no 4-bit form.
    """
    grouped: dict[str, list[Linear]] = {}
    for linear in find_linears(spec):
        if linear.role not in ROUTERS and (mtp or not linear.role.startswith("mtp.")):
            grouped.setdefault(unit_name(linear.module), []).append(linear)
    units: list[Unit] = []
    for name, linears in grouped.items():
        divide = all(FORMATS[four_bit].divides(*linear.shape, block_rows) for linear in linears)
        formats = (four_bit, "fp8", "bf16") if divide else ("fp8", "bf16")
        units.append(Unit(name, tuple(linears), formats))
    return units


def unit_name(module: str) -> str:
    """Return the name of the unit that a linear belongs to (the groups of ModelOpt's AutoQuantize)."""
    if ".experts.*." in module:
        return module.partition(".*.")[0]
    mixer, _, last = module.rpartition(".")
    return f"{mixer}.qkv" if last in _TOGETHER else module


def _input_norms(program: Program) -> dict[str, str]:
    """Return for each weight that multiplies the output of a norm the name of the norm's weights."""
    found: dict[str, str] = {}
    outputs: dict[str, str] = {}  # values between calls that a norm made → its weights
    for call in program.calls():
        function = program.functions[call.function]
        actual = dict(zip((formal.name for formal in function.parameters), call.parameters, strict=True))
        normed = {
            id(value): outputs[name]
            for value, name in zip(function.inputs, call.inputs, strict=True)
            if name in outputs
        }
        for node in function.nodes:
            if node.op in (ops.rms_norm, ops.gated_rms_norm):
                weight = node["weight"]
                normed[id(node.results[0])] = actual[weight.name]
            elif node.weights and id(node["x"]) in normed:
                found.setdefault(
                    actual[node.weights[0].name], normed[id(node["x"])]
                )  # the head: of the trunk, not of MTP
        outputs |= {
            name: normed[id(value)]
            for value, name in zip(function.outputs, call.outputs, strict=True)
            if id(value) in normed
        }
    return found
