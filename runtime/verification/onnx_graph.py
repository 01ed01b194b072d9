"""ONNX graphs as a form of the model: the very files of a build, or their float32 rendering."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx

from n3c.ir.program import Program
from n3c.ir.types import DType
from n3c.runtime.engines.interface import Array

from .implementation import Feeder, valid
from .scenario import Step
from .trace import Trace

Evaluate = Callable[[Mapping[str, Array]], Sequence[Array]]
"""Runs a graph: inputs by name → its outputs in order."""


@dataclass(frozen=True, slots=True)
class Graph:
    """A graph, ready to run, with what its layers give among its outputs."""

    evaluate: Evaluate
    inputs: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]
    outputs: tuple[str, ...]
    layers: Mapping[str, str]
    """Label of a layer → the output that it gives."""
    batch: int
    narrow: bool
    """Whether activations are quantized in it."""


NARROWING = ("QuantizeLinear", "DynamicQuantizeLinear", "TRT_FP4DynamicQuantize")


def prepare(model: onnx.ModelProto, program: Program, make: Callable[[onnx.ModelProto], Evaluate]) -> Graph:
    """Add to a graph the results of its layers as outputs, and make it ready by `make`."""
    layers = _layers(model.graph, program)
    known = {value.name for value in model.graph.output}
    for name in layers.values():
        if name not in known:
            model.graph.output.append(onnx.ValueInfoProto(name=name))
            known.add(name)
    inputs = {value.name: _described(value) for value in model.graph.input}
    batch = next((shape[0] for name, (_, shape) in inputs.items() if name in ("input_ids", "lengths")), 1)
    narrow = any(node.op_type in NARROWING for node in model.graph.node)
    return Graph(make(model), inputs, tuple(v.name for v in model.graph.output), layers, batch, narrow)


def _described(value: onnx.ValueInfoProto) -> tuple[np.dtype[Any], tuple[int, ...]]:
    tensor = value.type.tensor_type
    return onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type), tuple(d.dim_value for d in tensor.shape.dim)


def _layers(graph: onnx.GraphProto, program: Program) -> dict[str, str]:
    """Return, for each label, the last value that leaves its scope: nodes are named `<label>/<op>`."""
    states = {f"{name}.next" for name in program.states}
    scope = {output: node.name.partition("/")[0] for node in graph.node for output in node.output}
    leaving = {value.name for value in graph.output} - states
    for node in graph.node:
        leaving.update(name for name in node.input if scope.get(name, "") != node.name.partition("/")[0])
    labels = {call.label for call in program.calls()}  # nodes of embedded weights have scopes of their own
    return {label: out for out, label in scope.items() if label in labels and out in leaving and out not in states}


class OnnxLeg:
    """Runs graphs of each entry point, one behind the other where it is cut into stages."""

    def __init__(
        self,
        name: str,
        program: Program,
        graphs: Mapping[str, Sequence[Graph]],
        weights: Mapping[str, Array],
        tolerance: float,
        narrow_tolerance: float,
    ) -> None:
        """Take `weights` by the names of graph inputs, in the stored types of the program.

        `narrow_tolerance` holds from the first graph on that quantizes activations: what it leaves in the states
        stays there.
        """
        self.name = name
        self._tolerances = (tolerance, narrow_tolerance)
        self._program, self._graphs, self._feeder = program, graphs, Feeder(program)
        self._weights = {
            name: _as_input(weights[name], dtype, shape)
            for stages in graphs.values()
            for graph in stages
            for name, (dtype, shape) in graph.inputs.items()
            if name in weights
        }
        self.reset()

    def reset(self) -> None:
        """Zero states."""
        self.tolerance = self._tolerances[0]
        self._feeder.reset()
        self._states: dict[str, Array] = {}

    def run(self, step: Step) -> Trace | None:
        """Run the graphs of the step's entry point."""
        if step.entry not in self._graphs:
            return None
        entry, stages = self._program.entry_points[step.entry], self._graphs[step.entry]
        if any(graph.narrow for graph in stages):
            self.tolerance = self._tolerances[1]
        given = self._feeder.inputs(step)
        batch = len(step.tokens)
        rows = [slice(None)] if stages[0].batch == batch else [slice(row, row + 1) for row in range(batch)]
        parts = [self._call(stages, given, row, batch) for row in rows]
        results = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for name in [name for name in results if name.removesuffix(".next") in self._program.states]:
            self._states[name.removesuffix(".next")] = results[name]
        self._feeder.keep(step, {n: np.asarray(results[n], np.float32) for n in entry.outputs if n in results})
        layers = {label: output for graph in stages for label, output in graph.layers.items()}
        trace = {label: valid(np.asarray(results[output], np.float32), step, entry) for label, output in layers.items()}
        return trace | {name: self._stored(name) for name in self._states}

    def _stored(self, name: str) -> Array:
        """Return what a state holds, in float32; FP8 caches are written as pairs of codes."""
        value = self._states[name]
        if self._program.states[name].type.dtype is DType.F8E4M3 and value.dtype == np.float16:
            value = np.ascontiguousarray(value).view(ml_dtypes.float8_e4m3fn)
        return np.asarray(value, np.float32)

    def _call(self, stages: Sequence[Graph], given: Mapping[str, Array], row: slice, batch: int) -> dict[str, Array]:
        known: dict[str, Array] = {}
        for graph in stages:
            feeds = {
                name: self._input(name, dtype, shape, given, row, batch, known)
                for name, (dtype, shape) in graph.inputs.items()
            }
            known.update(zip(graph.outputs, graph.evaluate(feeds), strict=True))
        return known

    def _input(
        self,
        name: str,
        dtype: np.dtype[Any],
        shape: tuple[int, ...],
        given: Mapping[str, Array],
        row: slice,
        batch: int,
        known: Mapping[str, Array],
    ) -> Array:
        if name in self._weights:
            return self._weights[name]
        if name in given:
            return given[name] if name == "key_positions" else given[name][row].astype(dtype)
        if name in known:
            return known[name]
        state = name.removesuffix(".view")
        if state != name:  # the memory of a state in another type
            half = self._input(state, np.dtype(np.float16), (*shape[:-1], shape[-1] // 2), given, row, batch, known)
            return np.ascontiguousarray(half).view(dtype)
        if name not in self._states:
            self._states[name] = np.zeros((batch, *shape[1:]), dtype)
        return self._states[name][row]


def _as_input(value: Array, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    """Return the bytes of a weight in the type of a graph input; FP4 codes one a byte, as numpy holds them."""
    raw = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
    if dtype == ml_dtypes.float4_e2m1fn:
        raw = np.stack((raw & 15, raw >> 4), axis=-1)
    return raw.reshape(-1).view(dtype).reshape(shape)
