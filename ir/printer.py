"""The text form of a program: deterministic, so that dumps and golden files can be compared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .program import EntryPoint, Function, Node, Origin, Program, Value


def print_program(program: Program, *, origins: bool = False) -> str:
    """Return the text form; with `origins` each node tells its spec line and the pass that made it."""
    return "\n".join(_lines(program, origins)) + "\n"


def print_function(function: Function, *, origins: bool = False) -> str:
    """Return the text form of one function."""
    return "\n".join(_function(function, origins)) + "\n"


def _lines(program: Program, origins: bool) -> Iterator[str]:
    yield f"program {program.name}"
    for function in program.functions.values():
        yield ""
        yield from _function(function, origins)
    for entry in program.entry_points.values():
        yield ""
        yield from _entry(program, entry)
    if program.states:
        yield ""
        yield "states"
        for state in program.states.values():
            yield f"  {state.name}: {state.type} {state.kind}"
    yield ""
    yield "parameters"
    for parameter in program.parameters.values():
        yield f"  {parameter.name}: {parameter.type} role={parameter.role} = {parameter.source}"


def _typed(values: Iterable[Value]) -> str:
    return ", ".join(f"{value}: {value.type}" for value in values)


def _function(function: Function, origins: bool) -> Iterator[str]:
    yield f"func @{function.name}({_typed(function.inputs)})"
    for value in function.parameters:
        yield f"    param {value}: {value.type}"
    for value in function.states:
        yield f"    state {value}: {value.type}"
    yield "{"
    for node in function.nodes:
        yield f"  {_node(node)}{_comment(node.origin) if origins else ''}"
    yield f"  return {', '.join(map(str, function.outputs))}"
    for state, after in zip(function.states, function.next_states, strict=True):
        yield f"  next {state} = {after}"
    yield "}"


def _node(node: Node) -> str:
    results = ", ".join(f"{r}: {r.type}" for r in node.results)
    operands = ", ".join("none" if v is None else str(v) for v in node.operands)
    attributes = ", ".join(f"{name}={value!r}" for name, value in sorted(node.attributes.items()))
    return f"{results} = {node.op.name}({operands})" + (f" {{{attributes}}}" if attributes else "")


def _comment(origin: Origin) -> str:
    return f"  # {origin.made_by}" + (f", {origin.span}" if origin.span else "")


def _entry(program: Program, entry: EntryPoint) -> Iterator[str]:
    inputs = ", ".join(f"{name}: {type_}" for name, type_ in entry.inputs.items())
    yield f"entry {entry.name}({inputs})"
    yield "{"
    for call in entry.calls:
        yield f"  {', '.join(call.outputs) or 'none'} = @{call.function}({', '.join(call.inputs)}) at {call.label}"
        function = program.functions[call.function]
        for what, formals, actual in (
            ("param", function.parameters, call.parameters),
            ("state", function.states, call.states),
        ):
            if actual:
                yield f"      {what} {_bound(call.label, formals, actual)}"
    yield f"  return {', '.join(entry.outputs)}"
    yield "}"


def _bound(label: str, formals: list[Value], actual: list[str]) -> str:
    """Return what is bound to each formal in order; one below `label` whose name is the formal's is that name alone."""
    pairs = zip(formals, actual, strict=True)
    return ", ".join(f.name if name == f"{label}.{f.name}" else f"{f.name}={name}" for f, name in pairs)
