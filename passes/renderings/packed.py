"""pack: bind codes of types that a GPU lacks as bytes, for spellings that decode them by tables.

Pattern: a parameter in FP4 becomes i8 of half the width (two codes a byte, the low nibble first), one
in FP8 i8 of the same shape: the same bytes of the checkpoint. States stay as they are. Not part of a
pipeline: it makes a copy, for one target of several.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from n3c.ir.program import Call, EntryPoint, Program
from n3c.ir.source import Bytes
from n3c.ir.types import DType, TensorType

CODES_A_BYTE = {DType.F4E2M1: 2, DType.F8E4M3: 1}
"""Types that can be bound as bytes → how many codes one holds."""


def packed(program: Program, entry: EntryPoint, types: Collection[DType]) -> tuple[Program, EntryPoint]:
    """Return a copy of `entry` whose parameters of `types` are bytes, and its program; both arguments stay."""
    made = Program(program.name, parameters=dict(program.parameters), states=program.states)
    for name in dict.fromkeys(call.function for call in entry.calls):
        twin = program.functions[name].clone(name)
        for formal in twin.parameters:
            formal.type = as_bytes(formal.type, types)
        made.functions[name] = twin
    calls: list[Call] = []
    for call in entry.calls:
        for name in call.parameters:
            old = program.parameters[name]
            type_ = as_bytes(old.type, types)
            if type_ != old.type:
                made.parameters[name] = replace(old, type=type_, source=Bytes(old.source))
        calls.append(replace(call))
    copy = EntryPoint(entry.name, dict(entry.inputs), calls, list(entry.outputs), entry.tokens)
    made.entry_points[entry.name] = copy
    return made, copy


def as_bytes(type_: TensorType, types: Collection[DType]) -> TensorType:
    """Return the type of the same bytes as i8, where its element type is one of `types`."""
    if type_.dtype not in types:
        return type_
    *outer, last = type_.static_dims
    return TensorType(DType.I8, (*outer, last // CODES_A_BYTE[type_.dtype]))
