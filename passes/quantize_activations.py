"""quantize_activations: round what linears of NVFP4 and FP8 read, as their format says, in every entry point.

    linear(x, w)
  →
    linear(quantize_activation(x, input_scale), w)

Pattern: a weight whose format quantizes activations (`WeightFormat.input_divisor`). Between the two linears of
`experts` it is that op that rounds. The scale is the checkpoint's, of a whole tensor: no token's result depends on
others or on padding. A GPU that lacks a format's types computes weight-only with it, as its weights come through
tables; so does `serving.activations = "weight_only"`, which leaves this pass without formats. After fuse_moe, which
decides how experts are computed; before pack, which hides the types of codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from n3c.ir import ops
from n3c.ir.formats import FORMATS, INPUT_SCALE
from n3c.ir.program import Call, Function, Node, Parameter, Program, Value
from n3c.ir.rewrite import Builder
from n3c.ir.source import Fp8, InputScale, Nvfp4, Stack, Tensor
from n3c.ir.types import DType, TensorType

ROUNDED = tuple(format_.name for format_ in FORMATS.values() if format_.input_divisor is not None)
"""Formats that quantize activations."""
SCALE = TensorType(DType.F32, ())


@dataclass(frozen=True, slots=True)
class QuantizeActivations:
    """Activations rounded in front of linears."""

    name: ClassVar[str] = "quantize_activations"

    formats: frozenset[str] = frozenset(ROUNDED)
    """Those formats of weights whose activations are rounded."""

    def run(self, program: Program) -> bool:
        """Rewrite functions, and give their calls the scales; return whether any linear has such a format."""
        changed = False
        for function in list(program.functions.values()):
            calls = [call for call in program.calls() if call.function == function.name]
            for node in [node for node in function.nodes if node.op.weights]:
                changed |= self._round(program, function, calls, node)
        return changed

    def _round(self, program: Program, function: Function, calls: list[Call], node: Node) -> bool:
        """Round what `node` reads, and what its second linear reads."""
        formats = [program.bound(calls[0], weight.stored[0]).format if calls else "" for weight in node.weights]
        outer, *inner = formats
        if outer in self.formats:
            scale = self._scale(program, function, calls, node.weights[0])
            build = Builder.before(function, node, self.name)
            node.operands[node.op.position("x")] = build.emit(
                ops.quantize_activation, node["x"], scale, name=f"{node['x'].name}_q", format=outer
            )
        if inner and inner[0] in self.formats:
            node.operands[node.op.position("inner_scale")] = self._scale(program, function, calls, node.weights[1])
            node.attributes["inner_format"] = inner[0]
        return not self.formats.isdisjoint(formats)

    def _scale(self, program: Program, function: Function, calls: list[Call], weight: Value) -> Value:
        """Return a new formal for the scale of what is multiplied with `weight`, bound in every call."""
        codes = weight.stored[0]
        scale = Value(codes.name.removesuffix(".weight") + INPUT_SCALE, SCALE)
        for call in calls:
            parameter = program.bound(call, codes)
            made = self._parameter(parameter)
            program.parameters[made.name] = made
            call.parameters.append(made.name)
        function.parameters.append(scale)
        return scale

    def _parameter(self, codes: Parameter) -> Parameter:
        source = codes.source
        assert isinstance(source, Nvfp4 | Fp8) and isinstance(source.operand, Tensor | Stack)  # formats are of linears
        scale = InputScale(source.operand)
        name = str(scale.names[0] if isinstance(source.operand, Tensor) else source.operand.pattern)
        name = name.removesuffix(".weight").removesuffix(INPUT_SCALE) + INPUT_SCALE
        role, origin = f"{codes.role}{INPUT_SCALE}", codes.origin.by(self.name)
        return Parameter(name, SCALE, role, scale, codes.layer, format="f32", origin=origin)
