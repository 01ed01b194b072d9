"""Dispatch of experts: only the chosen ones are computed, or in some entry points all of them at once.

    experts(x, indices, weights, up, down)
  →
    rows = expand_experts(x)
    inner = expert_linear(rows, indices, up)
    active = relu2(inner)
    outer = expert_linear(active, indices, down)
    combine_experts(outer, weights)

The chain reads only the weights of the chosen experts, which is what an entry point of few tokens wants. A
chunk of tokens meets nearly every expert, so the op stays in the entry points named in `batched`; a function
that both kinds call becomes two.
"""

from __future__ import annotations

from collections.abc import Collection

from n3c.ir import ops
from n3c.ir.program import Function, Program
from n3c.ir.rewrite import Builder


def dispatch_experts(program: Program, batched: Collection[str], made_by: str) -> bool:
    """Rewrite `experts` wherever no entry point of `batched` calls it; return whether anything changed."""
    changed = _separate(program, batched)
    kept = {call.function for entry in program.entry_points.values() if entry.name in batched for call in entry.calls}
    for function in program.functions.values():
        if function.name not in kept:
            changed |= _gather_chosen(function, made_by)
    return changed


def _separate(program: Program, batched: Collection[str]) -> bool:
    """Give entry points of `batched` their own copy of each function with experts that others call, too."""
    others = {c.function for e in program.entry_points.values() if e.name not in batched for c in e.calls}
    changed = False
    for entry in [entry for entry in program.entry_points.values() if entry.name in batched]:
        for call in entry.calls:
            function = program.functions[call.function]
            if function.name in others and any(node.op is ops.experts for node in function.nodes):
                call.function = f"{function.name}.{entry.name}"
                if call.function not in program.functions:
                    program.functions[call.function] = function.clone(call.function)
                changed = True
    return changed


def _gather_chosen(function: Function, made_by: str) -> bool:
    found = [node for node in function.nodes if node.op is ops.experts]
    for node in found:
        build, indices = Builder.before(function, node, made_by), node["indices"]
        rows = build.emit(ops.expand_experts, node["x"], name="rows")
        inner = build.emit(ops.expert_linear, rows, indices, node["up"], name="inner")
        active = build.emit(ops.relu2, inner, name="active")
        outer = build.emit(ops.expert_linear, active, indices, node["down"], name="outer")
        combined = build.emit(ops.combine_experts, outer, node["weights"], name="combined")
        build.replace(node, combined)
    return bool(found)
