"""Codes of experts as bytes: NVFP4 codes that an `expert_linear` reads are bound as i8, two codes each.

They are the same memory, in a type that engines can gather by expert (FP4 tensors cannot be gathered). Where
another entry point computes all experts at once, it binds the same memory as FP4, under the name `….fp4`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from n3c.ir import ops
from n3c.ir.ops import OpDef
from n3c.ir.program import Function, Program, Value
from n3c.ir.source import Bytes
from n3c.ir.types import DType

FP4 = ".fp4"
"""Suffix of the name of codes that are bound as FP4 while others bind the same bytes as i8."""


def bind_codes_as_bytes(program: Program, made_by: str) -> bool:
    """Rewrite formals, and the parameters that calls bind to them; return whether anything changed."""
    gathered: set[str] = set()
    for function in program.functions.values():
        for codes in _codes(function, ops.expert_linear):
            codes.type = codes.type.as_bytes()
            calls = (call for call in program.calls() if call.function == function.name)
            gathered.update(program.bound(call, codes).name for call in calls)
    for call in program.calls():
        function = program.functions[call.function]
        for codes in _codes(function, ops.experts):
            parameter = program.bound(call, codes)
            if parameter.name in gathered:
                twin = replace(parameter, name=parameter.name + FP4, origin=parameter.origin.by(made_by))
                program.parameters[twin.name] = twin
                call.parameters[function.parameters.index(codes)] = twin.name
    for name in gathered:
        old = program.parameters[name]
        program.parameters[name] = replace(
            old, type=old.type.as_bytes(), source=Bytes(old.source), origin=old.origin.by(made_by)
        )
    return bool(gathered)


def _codes(function: Function, reader: OpDef) -> Iterator[Value]:
    """Yield the formals that hold FP4 codes of the weights of `reader`."""
    for node in function.nodes:
        if node.op is reader:
            for weight in node.weights:
                codes = weight.stored[0]
                if codes.type.dtype is DType.F4E2M1:
                    yield codes
