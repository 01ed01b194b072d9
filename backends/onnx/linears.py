"""Which linears an entry point has, and which graph input holds the weight of each: what an audit needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from n3c.ir import ops
from n3c.ir.program import Call, EntryPoint, Node, Parameter, Program
from n3c.ir.source import Bytes, Concat, Fp8, NegExp, Nvfp4, Source, Stack, Tensor
from n3c.ir.types import DType

_UNQUANTIZED = {DType.F32: "fp32", DType.F16: "fp16", DType.BF16: "bf16"}


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear to audit."""

    name: str
    """Module name in the checkpoint."""
    requested: str
    """nvfp4, w4a16_nvfp4, fp8, bf16, fp16 or fp32."""
    weight: str
    """Engine input that holds its weight, packed if it is quantized."""
    selected: int
    """Weights (elements) that one call reads: all, or those of the chosen experts."""
    total: int
    """Weights (elements) in all."""
    shape: tuple[int, int]
    """[N, K] of one matrix."""
    rows: int
    """Rows that one matrix is applied to in a call: sequences times tokens."""


def linears_of(program: Program, entry: EntryPoint, dims: Mapping[str, int]) -> tuple[Linear, ...]:
    """Return the linears of an entry point in the order of its calls; merged ones once for each part.

    A stack of experts is one linear, named with `*` for the expert, as in
    `backbone.layers.1.mixer.experts.*.up_proj`.
    """
    return tuple(
        linear
        for call in entry.calls
        for node in program.functions[call.function].nodes
        if node.op in (ops.linear, ops.expert_linear)
        for linear in _linears(program, call, node, dict(dims))
    )


def _linears(program: Program, call: Call, node: Node, dims: dict[str, int]) -> Iterator[Linear]:
    weight = node.operand(node.op.operands.index("weight"))
    codes = weight if weight.node is None else weight.node.operand(0)
    formals = program.functions[call.function].parameters
    parameter = program.parameters[call.parameters[formals.index(codes)]]
    total = selected = weight.type.elements
    *_, n, k = weight.type.static_dims
    rows = prod(node.operand(0).type.bind(dims).static_dims[:2])
    if node.op is ops.expert_linear:
        chosen = node.operand(1).type.bind(dims).elements
        selected = chosen * prod(weight.type.static_dims[1:])
    for name in _modules(parameter.source):
        yield Linear(name, _format(parameter), parameter.name, selected, total, (n, k), rows)


def _format(parameter: Parameter) -> str:
    return _UNQUANTIZED.get(parameter.type.dtype, parameter.format)


def _modules(source: Source) -> Iterator[str]:
    """Yield the modules whose weights `source` holds."""
    match source:
        case Tensor(name) | Stack(name, _):
            yield name.removesuffix(".weight")
        case Concat(parts):
            for part in parts:
                yield from _modules(part)
        case NegExp(operand) | Nvfp4(operand) | Fp8(operand) | Bytes(operand):
            yield from _modules(operand)
