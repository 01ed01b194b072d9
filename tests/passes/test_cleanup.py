"""cleanup: equal nodes are computed once, and only equal ones; what nobody needs is dropped."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from n3c.ir import ops
from n3c.ir.program import Call, EntryPoint, Function, Origin, Parameter, Program, State, Value
from n3c.ir.rewrite import Builder
from n3c.ir.source import Tensor
from n3c.ir.types import DType, TensorType
from n3c.ir.verify import verify
from n3c.passes.cleanup import Cleanup

X = TensorType(DType.F32, ("B", "S", 8))


class Small:
    """A program of one function of x, y and two parameters; `add` appends what is to be cleaned up."""

    def __init__(self) -> None:
        self.x, self.y = Value("x", X), Value("y", X)
        self.v, self.w = (Value(name, TensorType(DType.F32, (8,))) for name in ("v", "w"))
        self.function = Function("f", "test", [self.x, self.y], [self.v, self.w])
        self.build = Builder(self.function, Origin())

    def program(self, *outputs: Value) -> Program:
        self.function.outputs = list(outputs)
        program = Program("small", {"f": self.function})
        for value in self.function.parameters:
            program.parameters[value.name] = Parameter(value.name, value.type, "test", Tensor(value.name))
        names = [f"out{i}" for i in range(len(outputs))]
        call = Call("f", "at", ["x", "y"], names, list(program.parameters))
        program.entry_points["run"] = EntryPoint("run", {"x": X, "y": X}, [call], names)
        verify(program)
        return program

    def norm(self, weight: Value, eps: float = 1e-5) -> Value:
        return self.build.emit(ops.rms_norm, self.x, weight, name="n", eps=eps)

    def joined(self, x: Value, y: Value) -> Value:
        return self.build.emit(ops.concat, x, y, name="c")

    def half(self, first: int) -> Value:
        return self.build.emit_many(ops.split, self.x, names=["a", "b"], sizes=(first, 8 - first))[0]


def test_equal_nodes_become_one() -> None:
    small = Small()
    program = small.program(small.norm(small.v), small.norm(small.v))
    assert Cleanup().run(program)
    verify(program)
    (node,) = small.function.nodes
    assert small.function.outputs == [node.results[0]] * 2
    assert list(program.parameters) == ["v", "w"], "a parameter that a call binds stays"
    assert not Cleanup().run(program)


PAIRS: dict[str, Callable[[Small], tuple[Value, Value]]] = {
    "attributes": lambda s: (s.norm(s.v, 1e-5), s.norm(s.v, 1e-6)),
    "a tuple attribute": lambda s: (s.half(4), s.half(6)),
    "operands": lambda s: (s.norm(s.v), s.norm(s.w)),
    "order of operands": lambda s: (s.joined(s.x, s.y), s.joined(s.y, s.x)),
    "op": lambda s: (s.build.emit(ops.relu2, s.x, name="r"), s.build.emit(ops.shift_left, s.x, name="r")),
}


@pytest.mark.parametrize("pair", PAIRS.values(), ids=list(PAIRS))
def test_what_differs_stays(pair: Callable[[Small], tuple[Value, Value]]) -> None:
    small = Small()
    program = small.program(*pair(small))
    assert not Cleanup().run(program)
    assert len(small.function.nodes) == 2
    assert small.function.outputs[0] is not small.function.outputs[1]


def test_equal_chains_collapse() -> None:
    """The second node of each chain is equal only once the first ones are merged."""
    small = Small()
    chains = [small.build.emit(ops.relu2, small.norm(small.v), name="r") for _ in range(2)]
    program = small.program(*chains)
    assert Cleanup().run(program)
    assert [node.op for node in small.function.nodes] == [ops.rms_norm, ops.relu2]


def test_nodes_without_readers_go_and_those_of_states_stay() -> None:
    small = Small()
    dead = small.norm(small.v)
    small.build.emit(ops.relu2, dead, name="r")
    kept = small.norm(small.w)
    state = Value("state", X)
    small.function.states, small.function.next_states = [state], [kept]
    program = Program("small", {"f": small.function, "unused": Function("unused", "test", [], [])})
    for name in ("v", "w", "unbound"):
        program.parameters[name] = Parameter(name, small.v.type, "test", Tensor(name))
    program.states = {name: State(name, X, "test", 0) for name in ("state", "unused")}
    calls = [Call("f", "at", ["x", "y"], [], ["v", "w"], ["state"])]
    program.entry_points["run"] = EntryPoint("run", {"x": X, "y": X}, calls, [])
    verify(program)
    assert Cleanup().run(program)
    verify(program)
    assert small.function.nodes == [kept.node]
    assert (list(program.functions), list(program.parameters), list(program.states)) == (["f"], ["v", "w"], ["state"])
    assert program.entry_points["run"].calls == calls, "a call that writes a state stays, whatever reads its results"


def test_calls_that_no_output_needs_go() -> None:
    small = Small()
    program = small.program(small.norm(small.v))
    entry = program.entry_points["run"]
    entry.calls.append(Call("f", "again", ["out0", "y"], ["unread"], ["v", "w"]))
    assert Cleanup().run(program)
    assert [call.label for call in entry.calls] == ["at"]
