"""fuse_moe: pick the dispatch of experts for serving, and merge linears that read the same input.

Patterns, in each function:
1. `experts` → expand_experts, expert_linear(up), relu2, expert_linear(down), combine_experts: the
   gather dispatch of entry points of few tokens, which reads only the chosen experts' weights. In the
   entry points of `batched` the op stays as it is: a chunk of tokens meets nearly every expert, so all
   of them are computed at once. A function that both kinds call becomes two.
2. NVFP4 codes read by an expert_linear become bytes of two codes: the same memory, in a type that
   engines can gather by expert (FP4 tensors cannot be gathered). What stays batched reads them as FP4
   under the name `….fp4`.
3. linears of one input whose weights are both stored in BF16 (router and latent_down; q, k and v) →
   one linear and a split. Quantized weights are not merged: each has a scale of its own. They merge
   alike in every entry point, so that all read one copy.

After quantize, as formats decide what may merge; after plan_state, which makes the entry points;
before cleanup, which would take parts of what merges away.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from n3c.ir import ops
from n3c.ir.program import Call, Function, Node, Parameter, Program, Value
from n3c.ir.source import Bytes, Concat
from n3c.ir.types import DType, TensorType

CODES_A_BYTE = 2
FP4 = ".fp4"
"""Behind the name of codes that are bound as FP4 while others bind the same bytes as i8."""


@dataclass(frozen=True, slots=True)
class FuseMoe:
    """Gather dispatch, packed bytes, merged projections."""

    name: ClassVar[str] = "fuse_moe"

    merge_linears: bool = True
    """Whether pattern 3 is applied."""
    batched: tuple[str, ...] = ("prefill",)
    """Entry points whose experts are computed all at once."""

    def run(self, program: Program) -> bool:
        """Rewrite functions and, with them, the parameters that their calls bind."""
        kept = self._batched(program)
        changed = False
        for function in program.functions.values():
            for node in [n for n in function.nodes if n.op is ops.experts and function.name not in kept]:
                _gather(function, node)
                changed = True
            for codes in _gathered_codes(function):
                _to_bytes(program, function, codes)
                changed = True
            while self.merge_linears and (group := _mergeable(function)):
                _merge(program, function, group)
                changed = True
        return changed

    def _batched(self, program: Program) -> set[str]:
        """Return the functions whose experts stay, after giving the batched entry points functions of their own."""
        kept: set[str] = set()
        others = {c.function for e in program.entry_points.values() if e.name not in self.batched for c in e.calls}
        for entry in [program.entry_points[name] for name in self.batched if name in program.entry_points]:
            for call in entry.calls:
                function = program.functions[call.function]
                if not any(node.op is ops.experts for node in function.nodes):
                    continue
                if function.name in others:
                    name = f"{function.name}.{entry.name}"
                    if name not in program.functions:
                        program.functions[name] = function.clone(name)
                    call.function = name
                kept.add(call.function)
                _as_fp4(program, program.functions[call.function], call)
        return kept


def _as_fp4(program: Program, function: Function, call: Call) -> None:
    """Bind the codes of experts under a name of their own, since others bind the same bytes as i8."""
    for node in function.nodes:
        if node.op is ops.experts:
            for weight in (node.operand(3), node.operand(4)):
                if weight.node is not None and weight.node.op is ops.dequantize_nvfp4:
                    index = function.parameters.index(weight.node.operand(0))
                    old = program.parameters[call.parameters[index]]
                    if not old.name.endswith(FP4):
                        made = replace(old, name=old.name + FP4, origin=old.origin.by(FuseMoe.name))
                        program.parameters[made.name] = made
                        call.parameters[index] = made.name


def _gather(function: Function, node: Node) -> None:
    x, indices, weights, up, down = (node.operand(i) for i in range(5))
    origin, at = node.origin.by(FuseMoe.name), function.nodes.index(node)
    rows = function.emit(ops.expand_experts, x, name="rows", origin=origin, at=at)
    inner = function.emit(ops.expert_linear, rows, indices, up, name="inner", origin=origin, at=at + 1)
    active = function.emit(ops.relu2, inner, name="active", origin=origin, at=at + 2)
    outer = function.emit(ops.expert_linear, active, indices, down, name="outer", origin=origin, at=at + 3)
    combined = function.emit(ops.combine_experts, outer, weights, name="combined", origin=origin, at=at + 4)
    function.replace(node.results[0], combined)
    function.nodes.remove(node)


def _gathered_codes(function: Function) -> list[Value]:
    """Return the formals that hold unpacked NVFP4 codes of experts."""
    found: list[Value] = []
    for node in function.nodes:
        if node.op is ops.expert_linear:
            made_by = node.operand(2).node
            if made_by is not None and made_by.op is ops.dequantize_nvfp4:
                codes = made_by.operand(0)
                if codes.type.dtype is DType.F4E2M1:
                    found.append(codes)
    return found


def _to_bytes(program: Program, function: Function, codes: Value) -> None:
    dims = codes.type.static_dims
    codes.type = TensorType(DType.I8, (*dims[:-1], dims[-1] // CODES_A_BYTE))
    index = function.parameters.index(codes)
    for call in program.calls():
        if call.function == function.name:
            old = program.parameters[call.parameters[index]]
            if old.type != codes.type:
                program.parameters[old.name] = replace(
                    old, type=codes.type, source=Bytes(old.source), origin=old.origin.by(FuseMoe.name)
                )


def _mergeable(function: Function) -> list[Node]:
    """Return two or more linears of one input with plain BF16 weights that nothing else reads."""
    groups: dict[int, list[Node]] = {}
    for node in function.nodes:
        if node.op is ops.linear:
            weight = node.operand(1)
            if weight in function.parameters and weight.type.dtype is DType.BF16 and len(function.uses(weight)) == 1:
                groups.setdefault(id(node.operand(0)), []).append(node)
    return next((group for group in groups.values() if len(group) > 1), [])


def _merge(program: Program, function: Function, group: list[Node]) -> None:
    x, weights = group[0].operand(0), [node.operand(1) for node in group]
    rows = tuple(weight.type.static_dims[0] for weight in weights)
    formal = Value(
        _merged_name([w.name for w in weights]), TensorType(DType.BF16, (sum(rows), weights[0].type.dims[1]))
    )
    indices = [function.parameters.index(weight) for weight in weights]
    origin, at = group[0].origin.by(FuseMoe.name), function.nodes.index(group[0])
    function.parameters.append(formal)
    merged = function.emit(ops.linear, x, formal, name="merged", origin=origin, at=at)
    pieces = function.emit_many(
        ops.split, [merged], [node.results[0].name for node in group], {"sizes": rows}, origin=origin, at=at + 1
    )
    for node, piece in zip(group, pieces, strict=True):
        function.replace(node.results[0], piece)
        function.nodes.remove(node)
    function.parameters = [p for p in function.parameters if p not in weights]
    for call in program.calls():
        if call.function == function.name:
            parts = [program.parameters[call.parameters[i]] for i in indices]
            whole = _concatenated(parts, formal)
            program.parameters[whole.name] = whole
            call.parameters = [name for i, name in enumerate(call.parameters) if i not in indices] + [whole.name]


def _merged_name(names: list[str]) -> str:
    """`mixer.q_proj.weight`, `mixer.k_proj.weight` → `mixer.q_proj+k_proj.weight`."""
    prefix = names[0].split(".")[0]
    return f"{prefix}.{'+'.join(name.removeprefix(f'{prefix}.').removesuffix('.weight') for name in names)}.weight"


def _concatenated(parts: list[Parameter], formal: Value) -> Parameter:
    first = parts[0]
    label = first.name.partition("mixer.")[0]
    return replace(
        first,
        name=label + formal.name,
        type=formal.type,
        role="+".join(part.role for part in parts),
        source=Concat(tuple(part.source for part in parts)),
        origin=first.origin.by(FuseMoe.name),
    )
