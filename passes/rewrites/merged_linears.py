"""Merged linears: linears of one input whose weights are stored in BF16 become one linear and a split.

    q, k, v = linear(h, w_q), linear(h, w_k), linear(h, w_v)
  →
    q, k, v = split(linear(h, w_q+k+v))

So are router and latent_down. Quantized weights are not merged: each has a scale of its own. Functions merge
alike in every entry point, so that all read one copy.
"""

from __future__ import annotations

from dataclasses import replace

from n3c.ir import ops
from n3c.ir.program import Function, Node, Parameter, Program, Value
from n3c.ir.rewrite import Builder
from n3c.ir.source import Concat
from n3c.ir.types import DType, TensorType


def merge_linears(program: Program, made_by: str) -> bool:
    """Rewrite functions, and the parameters that calls bind to them; return whether anything changed."""
    changed = False
    for function in program.functions.values():
        while group := _group(function):
            _merge(program, function, group, made_by)
            changed = True
    return changed


def _group(function: Function) -> list[Node]:
    """Return two or more linears of one input with plain BF16 weights that nothing else reads."""
    groups: dict[int, list[Node]] = {}
    for node in function.nodes:
        if node.op is ops.linear:
            weight = node["weight"]
            if weight in function.parameters and weight.type.dtype is DType.BF16 and len(function.uses(weight)) == 1:
                groups.setdefault(id(node["x"]), []).append(node)
    return next((group for group in groups.values() if len(group) > 1), [])


def _merge(program: Program, function: Function, group: list[Node], made_by: str) -> None:
    weights = [node["weight"] for node in group]
    rows = tuple(weight.type.static_dims[0] for weight in weights)
    type_ = TensorType(DType.BF16, (sum(rows), weights[0].type.dims[1]))
    formal = Value(_merged_name([weight.name for weight in weights]), type_)
    for call in program.calls():
        if call.function == function.name:
            parts = [program.bound(call, weight) for weight in weights]
            whole = _concatenated(parts, formal, made_by)
            program.parameters[whole.name] = whole
            bound = zip(function.parameters, call.parameters, strict=True)
            call.parameters = [name for value, name in bound if value not in weights] + [whole.name]
    function.parameters = [value for value in function.parameters if value not in weights] + [formal]
    build = Builder.before(function, group[0], made_by)
    merged = build.emit(ops.linear, group[0]["x"], formal, name="merged")
    pieces = build.emit_many(ops.split, merged, names=[node.results[0].name for node in group], sizes=rows)
    for node, piece in zip(group, pieces, strict=True):
        build.replace(node, piece)


def _merged_name(names: list[str]) -> str:
    """`mixer.q_proj.weight`, `mixer.k_proj.weight` → `mixer.q_proj+k_proj.weight`."""
    prefix = names[0].split(".")[0]
    return f"{prefix}.{'+'.join(name.removeprefix(f'{prefix}.').removesuffix('.weight') for name in names)}.weight"


def _concatenated(parts: list[Parameter], formal: Value, made_by: str) -> Parameter:
    first = parts[0]
    label = first.name.partition("mixer.")[0]
    return replace(
        first,
        name=label + formal.name,
        type=formal.type,
        role="+".join(part.role for part in parts),
        source=Concat(tuple(part.source for part in parts)),
        origin=first.origin.by(made_by),
    )
