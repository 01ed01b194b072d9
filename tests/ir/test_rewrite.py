"""The builder: where nodes go, how they are named, and what takes the place of what."""

from __future__ import annotations

import pytest

from n3c.ir import ops
from n3c.ir.diagnostics import Span
from n3c.ir.program import Function, Origin, Value
from n3c.ir.rewrite import Builder
from n3c.ir.types import DType, TensorType
from n3c.passes.serving import serve
from support.specs import QUANTIZED, small_spec

X = TensorType(DType.F32, ("B", "S", 8))
PLACE = Origin(Span("m.toml", 3, 1))


def chain(*names: str) -> Function:
    """Return a function that squares its input once a name."""
    function = Function("f", "test", [Value("x", X)], [])
    build, value = Builder(function, PLACE), function.inputs[0]
    for name in names:
        value = build.emit(ops.relu2, value, name=name)
    function.outputs = [value]
    return function


def results(function: Function) -> list[str]:
    return [value.name for node in function.nodes for value in node.results]


def test_nodes_go_in_front_of_the_point_in_the_order_in_which_they_are_made() -> None:
    function = chain("a", "b", "c")
    build = Builder.before(function, function.nodes[1], "some_pass")
    first = build.emit(ops.relu2, function.inputs[0], name="p")
    build.emit(ops.relu2, first, name="q")
    assert results(function) == ["a", "p", "q", "b", "c"]
    assert first.node is not None
    assert first.node.origin == Origin(PLACE.span, "some_pass")


def test_a_name_gets_one_number() -> None:
    function = chain("y", "y", "y")
    assert results(function) == ["y", "y_1", "y_2"]
    build = Builder(function, PLACE)
    assert build.emit(ops.relu2, function.inputs[0], name="y_1").name == "y_3"
    pieces = build.emit_many(ops.split, function.inputs[0], names=["z", "z"], sizes=(4, 4))
    assert [piece.name for piece in pieces] == ["z", "z_1"]


def test_what_replaces_a_node_takes_over_its_name() -> None:
    function = chain("y", "y", "out")
    node = function.nodes[1]
    build = Builder.before(function, node, "some_pass")
    build.replace(node, build.emit(ops.add, node["x"], node["x"], name=node.results[0].name))
    assert results(function) == ["y", "y_1", "out"]
    assert function.nodes[2]["x"] is function.nodes[1].results[0]
    build.emit(ops.relu2, function.inputs[0], name="p")
    assert results(function) == ["y", "y_1", "p", "out"], "the point moved on from the node that is gone"


def test_what_has_another_meaning_keeps_its_own_name() -> None:
    function = chain("y")
    node = function.nodes[0]
    build = Builder.before(function, node, "some_pass")
    build.replace(node, build.emit(ops.relu2, function.inputs[0], name="combined"))
    assert (results(function), function.outputs) == (["combined"], function.nodes[0].results)


def test_operands_have_names() -> None:
    function = Function("f", "test", [Value("x", X)], [Value("w", TensorType(DType.F32, (8, 1, 4)))])
    Builder(function, PLACE).emit(ops.causal_conv1d, function.inputs[0], function.parameters[0], name="y")
    (node,) = function.nodes
    assert node["weight"] is function.parameters[0]
    assert node.get("bias") is None
    assert node.named_operands == {"x": function.inputs[0], "weight": function.parameters[0], "bias": None}
    with pytest.raises(ValueError, match="causal_conv1d lacks operand `bias`"):
        _ = node["bias"]
    with pytest.raises(KeyError, match="not `window`"):
        node.get("window")


def test_dumps_have_no_name_with_two_numbers() -> None:
    def after(_: str, program: object) -> None:
        for function in program.functions.values():  # type: ignore[attr-defined]
            for node in function.nodes:
                for value in node.results:
                    head, _, last = value.name.rpartition("_")
                    assert not (last.isdigit() and head.rpartition("_")[2].isdigit()), value.name

    serve(small_spec(QUANTIZED), after)
