"""A growing ONNX graph with deterministic names; constants are shared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as onnx

from n3c.ir.types import DType

from .dtypes import ONNX_DTYPES

LOOP = "loop/"
"""In the names of nodes within a Loop."""
OPSET = 24
"""Of TensorScatter and Attention with caches."""
IR_VERSION = 11
"""Of float4e2m1."""

Array = npt.NDArray[Any]


class GraphBuilder:
    """Nodes, inputs, outputs and constants; `scope` goes in front of the names of what is added."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.scope = ""
        self.inputs: list[onnx.Value] = []
        self.outputs: list[onnx.Value] = []
        self.nodes: list[onnx.Node] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], onnx.Value] = {}
        self._taken: set[str] = set()

    def input(self, name: str, dtype: DType, dims: Sequence[int | str]) -> onnx.Value:
        """Declare a graph input of exactly that name; a named dim is dynamic."""
        self._taken.add(name)
        value = onnx.val(name, ONNX_DTYPES[dtype], tuple(dims))
        self.inputs.append(value)
        return value

    def output(self, value: onnx.Value, name: str, dtype: DType, dims: Sequence[int]) -> None:
        """Make `value` a graph output and give it exactly that name: no copy stands between.

        TensorRT writes caches in place only where TensorScatter itself makes the graph output.
        """
        if value.producer() is None or any(value is output for output in self.outputs):
            value = self.node("Identity", value)
        self._taken.add(name)
        value.name = name
        value.type = onnx.TensorType(ONNX_DTYPES[dtype])
        value.shape = onnx.Shape(dims)
        self.outputs.append(value)

    def node(self, op: str, *operands: onnx.Value | None, domain: str = "", **attributes: Any) -> onnx.Value:
        """Append a node with one result and return that."""
        return self.nodes_results(op, operands, 1, domain, attributes)[0]

    def nodes_results(
        self, op: str, operands: Sequence[onnx.Value | None], count: int, domain: str, attributes: dict[str, Any]
    ) -> Sequence[onnx.Value]:
        """Append a node with `count` results."""
        name = self._fresh(f"{self.scope}{op}")
        results = [onnx.val(name if count == 1 else f"{name}:{i}") for i in range(count)]
        node = onnx.node(op, operands, attributes, domain=domain, outputs=results, name=name)
        self.nodes.append(node)
        return results

    def split(self, value: onnx.Value, count: int, axis: int) -> Sequence[onnx.Value]:
        """Append a node that cuts an axis into `count` parts of one length.

        TensorRT's parser makes a layer of each part, and of each Slice with its bounds some 24, which compute what to
        do at a bound outside: the builder's time follows their number.
        """
        if count == 1:
            return (value,)
        return self.nodes_results("Split", (value,), count, "", {"axis": axis, "num_outputs": count})

    def loop(
        self, count: onnx.Value, start: onnx.Value, body: Callable[[onnx.Value, onnx.Value], onnx.Value]
    ) -> onnx.Value:
        """Append a Loop of `count` rounds (INT64 []) and return what `body`, of the round and a value, made of `start`.

        `body` adds its nodes as usual; it may read anything that was made before.
        """
        outside, scope, self.nodes, self.scope = self.nodes, self.scope, [], f"{self.scope}{LOOP}"
        index = onnx.val(self._fresh(f"{self.scope}round"), onnx.DataType.INT64, ())
        going = onnx.val(self._fresh(f"{self.scope}going"), onnx.DataType.BOOL, ())
        carried = onnx.val(self._fresh(f"{self.scope}carried"), onnx.DataType.FLOAT)
        made = body(index, carried)
        go_on = self.node("Identity", going)
        inside, self.nodes, self.scope = self.nodes, outside, scope
        graph = onnx.Graph([index, going, carried], [go_on, made], nodes=inside, name=self._fresh(f"{self.scope}body"))
        return self.node("Loop", count, self.constant(np.array(True)), start, body=graph)

    def constant(self, array: Array) -> onnx.Value:
        """Return a constant; equal ones are shared."""
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"constant.{len(self._constants)}"
            tensor = onnx.tensor(array, name=name)
            self._constants[key] = onnx.val(name, tensor.dtype, array.shape, const_value=tensor)
        return self._constants[key]

    def f32(self, number: float) -> onnx.Value:
        """Return a float32 scalar."""
        return self.constant(np.array(number, np.float32))

    def i64(self, *numbers: int) -> onnx.Value:
        """Return an int64 vector: axes, sizes, shapes."""
        return self.constant(np.array(numbers, np.int64))

    def model(self, producer: str) -> onnx.Model:
        """Return the finished model, without the nodes and constants that no output needs."""
        needed = {id(value) for value in self.outputs}
        nodes: list[onnx.Node] = []
        for node in reversed(self.nodes):
            if any(id(result) in needed for result in node.outputs):
                needed.update(id(value) for value in _read(node))
                nodes.append(node)
        for node in self.nodes:
            if not any(id(result) in needed for result in node.outputs):
                for i in range(len(node.inputs)):
                    node.replace_input_with(i, None)
        graph = onnx.Graph(
            self.inputs,
            self.outputs,
            nodes=reversed(nodes),
            initializers=[value for value in self._constants.values() if id(value) in needed],
            opset_imports={"": OPSET} | ({"trt": 1} if any(node.domain == "trt" for node in nodes) else {}),
            name=self.name,
        )
        return onnx.Model(graph, ir_version=IR_VERSION, producer_name=producer)

    def _fresh(self, name: str) -> str:
        candidate, n = name, 1
        while candidate in self._taken:
            candidate, n = f"{name}.{n}", n + 1
        self._taken.add(candidate)
        return candidate


def _read(node: onnx.Node) -> Iterator[onnx.Value | None]:
    """Yield what a node reads, itself and within its graph."""
    yield from node.inputs
    for attribute in node.attributes.values():
        if attribute.type == onnx.AttributeType.GRAPH:
            for inner in attribute.as_graph():
                yield from _read(inner)
