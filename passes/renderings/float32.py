"""widen: the float32 rendering of an entry point, for a runtime that knows no narrow type.

Pattern: `dequantize_*` nodes give way to parameters that hold the dequantized weight; every other
parameter and every state that is stored in a narrower type becomes float32. The numbers are those of
the quantized weights, exactly; states are not rounded. Not part of a pipeline: it makes a copy.
"""

from __future__ import annotations

from dataclasses import replace

from n3c.ir import ops
from n3c.ir.program import Call, EntryPoint, Function, Program, Value
from n3c.ir.source import Bytes, Dequantized, Fp8, Nvfp4, Rounded
from n3c.ir.types import DType
from n3c.passes.fuse_moe import FP4

DEQUANTIZE = (ops.dequantize_nvfp4, ops.dequantize_fp8)


def widened(program: Program, entry: EntryPoint) -> tuple[Program, EntryPoint]:
    """Return a copy of `entry` in float32 and the program that it belongs to; both arguments stay as they are.

    A dequantized weight has the name of its codes and a source of kind `Dequantized`.
    """
    made = Program(program.name)
    places = {name: _widened(program.functions[name], made) for name in dict.fromkeys(c.function for c in entry.calls)}
    calls: list[Call] = []
    for call in entry.calls:
        formals = made.functions[call.function].parameters
        actual = [call.parameters[i] for i in places[call.function]]
        for formal, name in zip(formals, actual, strict=True):
            parameter = program.parameters[name]
            source = parameter.source.operand if isinstance(parameter.source, Bytes) else parameter.source
            if isinstance(source, Nvfp4 | Fp8):
                source = Dequantized(source)
            elif parameter.type.dtype is DType.BF16:
                source = Rounded(source)
            wide = name.removesuffix(FP4)  # of the same bytes, so of the same values
            made.parameters[wide] = replace(parameter, name=wide, type=formal.type, source=source)
        for name in call.states:
            state = program.states[name]
            made.states[name] = replace(state, type=state.type.with_dtype(DType.F32))
        calls.append(replace(call, parameters=[name.removesuffix(FP4) for name in actual]))
    copy = EntryPoint(entry.name, dict(entry.inputs), calls, list(entry.outputs), entry.tokens)
    made.entry_points[entry.name] = copy
    return made, copy


def _widened(function: Function, program: Program) -> list[int]:
    """File a float32 copy of `function`; return the old index of each of its parameters."""
    twin = function.clone(function.name)
    formals = list(twin.parameters)
    kept = list(twin.parameters)
    for node in [n for n in twin.nodes if n.op in DEQUANTIZE]:
        codes, *scales = (node.operand(i) for i in range(len(node.operands)))
        weight = Value(codes.name, node.results[0].type)
        twin.replace(node.results[0], weight)
        twin.nodes.remove(node)
        kept = [weight if formal is codes else formal for formal in kept if formal not in scales]
        formals[formals.index(codes)] = weight
    twin.parameters = kept
    for value in twin.values():
        if value.type.dtype in (DType.F16, DType.BF16, DType.F8E4M3):
            value.type = value.type.with_dtype(DType.F32)
    program.functions[twin.name] = twin
    return [formals.index(formal) for formal in kept]
