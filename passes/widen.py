"""widen: compute everything in float32, for a runtime without narrow types (ONNX Runtime on a CPU, PyTorch).

Pattern: `dequantize_*` nodes give way to parameters that hold the dequantized weight; every other
parameter and every state that is stored in a narrower type becomes float32. The numbers are those of
the quantized weights, exactly; states are not rounded. In no pipeline: the float32 form of a
program is made of it, or of a copy (`Program.extract`), where it is needed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from n3c.ir.ops import DEQUANTIZE
from n3c.ir.program import Function, Parameter, Program, Value
from n3c.ir.source import Bytes, Dequantized, Fp8, Nvfp4, Rounded
from n3c.ir.types import DType

_NARROW = (DType.F16, DType.BF16, DType.F8E4M3)


@dataclass(frozen=True, slots=True)
class Widen:
    """Dequantized weights and float32 states."""

    name: ClassVar[str] = "widen"

    def run(self, program: Program) -> bool:
        """Rewrite functions, calls and tables; return whether anything was narrower.

        A dequantized weight has the name of its codes and a source of kind `Dequantized`.
        """
        types = [held.type for table in (program.parameters, program.states) for held in table.values()]
        narrow = any(type_.dtype is not DType.F32 for type_ in types)
        kept = {function.name: _widen(function) for function in program.functions.values()}
        parameters: dict[str, Parameter] = {}
        for call in program.calls():
            formals = program.functions[call.function].parameters
            bound = [program.parameters[call.parameters[index]] for index in kept[call.function]]
            wide = [self._wide(parameter, formal) for parameter, formal in zip(bound, formals, strict=True)]
            parameters.update((parameter.name, parameter) for parameter in wide)
            call.parameters = [parameter.name for parameter in wide]
        program.parameters = parameters
        program.states = {
            name: replace(state, type=state.type.with_dtype(DType.F32)) for name, state in program.states.items()
        }
        return narrow

    def _wide(self, parameter: Parameter, formal: Value) -> Parameter:
        """Return what stands for `parameter` where it is read as `formal`."""
        if formal.type == parameter.type:
            return parameter
        source = parameter.source.operand if isinstance(parameter.source, Bytes) else parameter.source
        source = Dequantized(source) if isinstance(source, Nvfp4 | Fp8) else Rounded(source)
        return replace(parameter, type=formal.type, source=source, origin=parameter.origin.by(self.name))


def _widen(function: Function) -> list[int]:
    """Rewrite `function`; return the former place of each of its parameters."""
    formals = list(function.parameters)
    for node in [node for node in function.nodes if node.op in DEQUANTIZE]:
        codes, *scales = node.results[0].stored
        codes.type = node.results[0].type
        function.replace(node.results[0], codes)
        function.nodes.remove(node)
        function.parameters = [formal for formal in function.parameters if formal not in scales]
    for value in function.values():
        if value.type.dtype in _NARROW:
            value.type = value.type.with_dtype(DType.F32)
    return [formals.index(formal) for formal in function.parameters]
