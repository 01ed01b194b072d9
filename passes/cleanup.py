"""cleanup: remove dead code and common subexpressions.

Pattern: nodes of a function without readers; two nodes with the same op, operands and attributes;
functions, calls, parameters and states that no entry point reaches. Last in a pipeline: others leave
rests for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from n3c.ir.program import Function, Node, Program


@dataclass(frozen=True, slots=True)
class Cleanup:
    """Common subexpressions and dead code."""

    name: ClassVar[str] = "cleanup"

    def run(self, program: Program) -> bool:
        """Rewrite `program` in place; return whether anything was dropped."""
        changed = False
        for entry in program.entry_points.values():
            needed = entry.needed(entry.outputs)
            changed |= len(needed) != len(entry.calls)
            entry.calls = needed
        used = {call.function for call in program.calls()}
        changed |= used != set(program.functions)
        program.functions = {name: f for name, f in program.functions.items() if name in used}
        for function in program.functions.values():
            changed |= _merge_equal(function) | _drop_nodes(function)
        parameters = {name for call in program.calls() for name in call.parameters}
        states = {name for call in program.calls() for name in call.states}
        changed |= parameters != set(program.parameters) or states != set(program.states)
        program.parameters = {name: p for name, p in program.parameters.items() if name in parameters}
        program.states = {name: s for name, s in program.states.items() if name in states}
        return changed


def _key(node: Node) -> tuple[object, ...]:
    return node.op.name, tuple(id(v) for v in node.operands), tuple(sorted(node.attributes.items()))


def _merge_equal(function: Function) -> bool:
    first: dict[tuple[object, ...], Node] = {}
    merged = False
    for node in list(function.nodes):
        twin = first.setdefault(_key(node), node)
        if twin is not node:
            for old, new in zip(node.results, twin.results, strict=True):
                function.replace(old, new)
            function.nodes.remove(node)
            merged = True
    return merged


def _drop_nodes(function: Function) -> bool:
    needed = {id(v) for v in (*function.outputs, *function.next_states)}
    kept: list[Node] = []
    for node in reversed(function.nodes):
        if any(id(result) in needed for result in node.results):
            needed.update(id(v) for v in node.operands if v is not None)
            kept.append(node)
    changed = len(kept) != len(function.nodes)
    function.nodes = kept[::-1]
    return changed
