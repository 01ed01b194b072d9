"""The verifier: whether a program is sound. The pipeline runs it between passes."""

from __future__ import annotations

from collections.abc import Iterator

from .program import EntryPoint, Function, Program, Value
from .types import TensorType


class InvalidProgramError(Exception):
    """An unsound program: the fault of whoever made it, never of a user. `faults` lists all."""

    def __init__(self, faults: list[str]) -> None:
        self.faults = faults
        super().__init__("\n".join(faults))


def verify(program: Program) -> None:
    """Check definitions before uses, types against shape rules, calls against functions; InvalidProgramError."""
    faults = [fault for function in program.functions.values() for fault in _function_faults(function)]
    for name, function in program.functions.items():
        if name != function.name:
            faults.append(f"function @{function.name} is filed under {name}")
    parameters = {name: parameter.type for name, parameter in program.parameters.items()}
    states = {name: state.type for name, state in program.states.items()}
    for entry in program.entry_points.values():
        faults.extend(_entry_faults(program, entry, parameters, states))
    if faults:
        raise InvalidProgramError(faults)


def _function_faults(function: Function) -> Iterator[str]:
    where = f"@{function.name}"
    names = [value.name for value in function.values()]
    for name in sorted({n for n in names if names.count(n) > 1}):
        yield f"{where}: %{name} is defined more than once"
    known = {id(v) for v in (*function.inputs, *function.parameters, *function.states)}
    for node in function.nodes:
        for operand in node.operands:
            if operand is not None and id(operand) not in known:
                yield f"{where}: {node.op.name} reads %{operand.name} before it is defined"
        try:
            types = node.op.infer([v.type if v else None for v in node.operands], node.attributes)
        except ValueError as error:
            yield f"{where}: {node.op.name}: {error}"
        else:
            if types != tuple(result.type for result in node.results):
                yield f"{where}: {node.op.name} gives {types}, not {[str(r.type) for r in node.results]}"
        for result in node.results:
            if result.node is not node:
                yield f"{where}: %{result.name} does not know its node"
            known.add(id(result))
    for value in (*function.outputs, *function.next_states):
        if id(value) not in known:
            yield f"{where}: returns %{value.name}, which is not defined"
    if [v.type for v in function.states] != [v.type for v in function.next_states]:
        yield f"{where}: states and next states differ"


def _entry_faults(
    program: Program, entry: EntryPoint, parameters: dict[str, TensorType], states: dict[str, TensorType]
) -> Iterator[str]:
    values: dict[str, TensorType] = dict(entry.inputs)
    written: set[str] = set()
    for call in entry.calls:
        where = f"{entry.name}: {call.label}"
        function = program.functions.get(call.function)
        if function is None:
            yield f"{where}: no function @{call.function}"
            continue
        yield from _binding_faults(where, "input", function.inputs, call.inputs, values)
        yield from _binding_faults(where, "parameter", function.parameters, call.parameters, parameters)
        yield from _binding_faults(where, "state", function.states, call.states, states)
        for name in call.states:
            if name in written:
                yield f"{where}: state {name} belongs to another call already"
            written.add(name)
        if len(call.outputs) != len(function.outputs):
            yield f"{where}: {len(call.outputs)} results of {len(function.outputs)}"
        for name, value in zip(call.outputs, function.outputs, strict=False):
            if name in values:
                yield f"{where}: value {name} is defined more than once"
            values[name] = value.type
    for name in entry.outputs:
        if name not in values:
            yield f"{entry.name}: output {name} is not defined"


def _binding_faults(
    where: str, what: str, formal: list[Value], actual: list[str], table: dict[str, TensorType]
) -> Iterator[str]:
    if len(formal) != len(actual):
        yield f"{where}: {len(actual)} {what}s for {len(formal)}"
        return
    if [value.type for value in formal] == [table.get(name) for name in actual]:
        return  # compared in C, by identity first: this is most of the verifier's work
    for value, name in zip(formal, actual, strict=True):
        if name not in table:
            yield f"{where}: no {what} {name}"
        elif table[name] != value.type:
            yield f"{where}: {what} {name} is {table[name]}, %{value.name} is {value.type}"
