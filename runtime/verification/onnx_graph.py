"""An ONNX graph with the results of its layers, made ready to run: whole, or layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from n3c.ir.program import Program
from n3c.runtime.engines.interface import Array

Evaluate = Callable[[Mapping[str, Array]], Sequence[Array]]
"""Runs a graph: inputs by name → its outputs in order."""
Load = Callable[[onnx.ModelProto], Evaluate]


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a graph that runs in one go."""

    evaluate: Evaluate
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    layer: str = ""
    """Label of the layer that it ends with; empty for the last segment and for a graph that runs whole."""


@dataclass(frozen=True, slots=True)
class Graph:
    """A graph, ready to run segment by segment."""

    segments: tuple[Segment, ...]
    inputs: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]
    outputs: tuple[str, ...]
    layers: Mapping[str, str]
    """Label of a layer → the value that it gives."""
    batch: int


def whole(model: onnx.ModelProto, program: Program, load: Load) -> Graph:
    """Return a graph of one segment, in which the results of layers are outputs."""
    layers = _layers(model.graph, program)
    outputs = list(dict.fromkeys([*(value.name for value in model.graph.output), *layers.values()]))
    known = {value.name for value in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs if name not in known)
    inputs = _inputs(model)
    return Graph((Segment(load(model), tuple(inputs), tuple(outputs)),), inputs, tuple(outputs), layers, _batch(inputs))


def layerwise(model: onnx.ModelProto, program: Program, load: Load) -> Graph:
    """Return a graph cut after the result of each layer."""
    layers = _layers(model.graph, program)
    inputs, outputs = _inputs(model), tuple(value.name for value in model.graph.output)
    segments = tuple(_segments(model, layers, outputs, load))
    return Graph(segments, inputs, outputs, layers, _batch(inputs))


def _segments(
    model: onnx.ModelProto, layers: Mapping[str, str], outputs: Sequence[str], load: Load
) -> Iterator[Segment]:
    label_of = {value: label for label, value in layers.items()}
    parts: list[list[Any]] = [[]]
    for node in model.graph.node:
        parts[-1].append(node)
        if any(name in label_of for name in node.output):
            parts.append([])
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    needed = set(outputs)
    wanted: list[set[str]] = []  # of each part: what later parts or the caller read
    for part in reversed(parts):
        wanted.append(set(needed))
        needed.update(name for node in part for name in _read(node))
    for part, read_later in zip(parts, reversed(wanted), strict=True):
        made = [name for node in part for name in node.output]
        read = dict.fromkeys(name for node in part for name in _read(node) if name and name not in set(made))
        graph = onnx.GraphProto(name=model.graph.name)
        graph.node.extend(part)
        graph.initializer.extend(constants[name] for name in read if name in constants)
        labels = [label_of[name] for name in made if name in label_of]
        given = tuple(name for name in read if name not in constants)
        results = tuple(name for name in made if name in read_later or name in label_of)
        graph.input.extend(onnx.ValueInfoProto(name=name) for name in given)
        graph.output.extend(onnx.ValueInfoProto(name=name) for name in results)
        cut = onnx.ModelProto(ir_version=model.ir_version, graph=graph)
        cut.opset_import.extend(model.opset_import)
        if part:
            yield Segment(load(cut), given, results, labels[0] if labels else "")


def _read(node: onnx.NodeProto) -> Iterator[str]:
    """Yield what a node reads, itself and within its graph, but for what that graph makes."""
    yield from node.input
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            own = {value.name for value in attribute.g.input}
            own.update(name for inner in attribute.g.node for name in inner.output)
            yield from (name for inner in attribute.g.node for name in _read(inner) if name not in own)


def _inputs(model: onnx.ModelProto) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """Return dtype and dims of the graph's inputs."""
    return {
        value.name: (
            onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type),
            tuple(d.dim_value for d in value.type.tensor_type.shape.dim),
        )
        for value in model.graph.input
    }


def _batch(inputs: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]) -> int:
    return next((shape[0] for name, (_, shape) in inputs.items() if name in ("input_ids", "lengths")), 1)


def _layers(graph: onnx.GraphProto, program: Program) -> dict[str, str]:
    """Return, for each label, the last value that leaves its scope: nodes are named `<label>/<op>`."""
    states = {f"{name}.next" for name in program.states}
    scope = {output: node.name.partition("/")[0] for node in graph.node for output in node.output}
    leaving = {value.name for value in graph.output} - states
    for node in graph.node:
        leaving.update(name for name in _read(node) if scope.get(name, "") != node.name.partition("/")[0])
    labels = {call.label for call in program.calls()}  # nodes of embedded weights have scopes of their own
    return {label: out for out, label in scope.items() if label in labels and out in leaving and out not in states}
