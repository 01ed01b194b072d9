"""Codes of experts as bytes: NVFP4 codes and block scales that are gathered by expert are bound as i8.

They are the same memory, in a type that engines can gather (FP4 and FP8 tensors they cannot, or not safely). Where
another entry point computes all experts at once, it binds the same memory as FP4 and FP8 besides, under the names
`….fp4` and `….fp8`, and the bytes for what it computes expert by expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from n3c.ir import ops
from n3c.ir.formats import as_bytes
from n3c.ir.op_definition import OpDef
from n3c.ir.program import Call, Function, Node, Program, Value
from n3c.ir.rewrite import Builder
from n3c.ir.source import Bytes
from n3c.ir.types import DType

TYPED = {DType.F4E2M1: ".fp4", DType.F8E4M3: ".fp8"}
"""Type → suffix of the name of what is bound in it while others bind the same bytes as i8."""


def bind_codes_as_bytes(program: Program, made_by: str) -> bool:
    """Rewrite formals, and the parameters that calls bind to them; return whether anything changed."""
    gathered: set[str] = set()
    for function in program.functions.values():
        calls = [call for call in program.calls() if call.function == function.name]
        for _, _, weight in _weights(function, ops.expert_linear):
            for stored in _codes(weight):
                gathered.update(program.bound(call, stored).name for call in calls)
                stored.type = as_bytes(stored.type)
    for function in program.functions.values():
        calls = [call for call in program.calls() if call.function == function.name]
        for node, name, weight in list(_weights(function, ops.experts)):
            if all(program.bound(call, weight.stored[0]).name in gathered for call in calls):
                _bind_both(program, function, calls, node, name, made_by)
    for name in gathered:
        old = program.parameters[name]
        program.parameters[name] = replace(
            old, type=as_bytes(old.type), source=Bytes(old.source), origin=old.origin.by(made_by)
        )
    return bool(gathered)


def _weights(function: Function, reader: OpDef) -> Iterator[tuple[Node, str, Value]]:
    """Yield the nodes `reader`, and name and value of each of their weights that is stored in NVFP4."""
    for node in function.nodes:
        for name in node.op.weights if node.op is reader else ():
            if node[name].stored[0].type.dtype is DType.F4E2M1:
                yield node, name, node[name]


def _codes(weight: Value) -> list[Value]:
    """Return the formals of a weight that are codes: its own, and those of the scales of its blocks."""
    return [stored for stored in weight.stored if stored.type.dtype in TYPED]


def _bind_both(program: Program, function: Function, calls: list[Call], node: Node, name: str, made_by: str) -> None:
    """Bind the codes of a weight of `experts` under names of their own, and their bytes besides."""
    weight, again = node[name], list[Value]()
    for stored in weight.stored:
        if stored.type.dtype not in TYPED:
            again.append(stored)
            continue
        formal = Value(f"{stored.name}.bytes", as_bytes(stored.type))
        function.parameters.append(formal)
        again.append(formal)
        for call in calls:
            parameter = program.bound(call, stored)
            twin = replace(
                parameter, name=parameter.name + TYPED[stored.type.dtype], origin=parameter.origin.by(made_by)
            )
            program.parameters[twin.name] = twin
            call.parameters[function.parameters.index(stored)] = twin.name
            call.parameters.append(parameter.name)
    build = Builder.before(function, node, made_by)
    read = build.emit(ops.dequantize_nvfp4, *again, name=f"{name}_bytes")
    node.operands[node.op.position(f"{name}_bytes")] = read
