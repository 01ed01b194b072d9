"""ONNX graphs as an implementation: the very files of a build, or their float32 rendering."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from n3c.backends.onnx.bindings import parameter_of
from n3c.ir.program import Program
from n3c.ir.types import DType
from n3c.runtime.engines.interface import Array

from .call_inputs import CallInputs, without_padding
from .implementation import Rounding
from .onnx_graph import Graph
from .scenario import Step
from .tolerance import Tolerance
from .trace import Trace


class OnnxGraphs:
    """Runs the graphs of each entry point, one after the other where it is cut into stages.

    Of graphs that run layer by layer, each layer begins with what the reference gave for the one before, and each
    step with the reference's states: what a layer rounds otherwise is its own difference and nobody else's.
    """

    def __init__(
        self,
        name: str,
        program: Program,
        graphs: Mapping[str, Sequence[Graph]],
        weights: Mapping[str, Array],
        rounding: Rounding,
        tolerance: Tolerance,
    ) -> None:
        """Take `weights` by the names of parameters, in the stored types of the program."""
        self.name, self.rounding, self.tolerance = name, rounding, tolerance
        self._program, self._graphs, self._inputs = program, graphs, CallInputs(program)
        self.weights = {
            name: _as_input(weights[parameter_of(name)], dtype, shape)
            for stages in graphs.values()
            for graph in stages
            for name, (dtype, shape) in graph.inputs.items()
            if parameter_of(name) in weights
        }
        self.reset()

    def reset(self) -> None:
        """Begin new sequences: zero states."""
        self._inputs.reset()
        self._states: dict[str, Array] = {}

    def run(self, step: Step, reference: Trace) -> Trace | None:
        """Run the graphs of the step's entry point."""
        if step.entry not in self._graphs:
            return None
        entry, stages = self._program.entry_points[step.entry], self._graphs[step.entry]
        given, batch = self._inputs.of(step), len(step.tokens)
        rows = [slice(None)] if stages[0].batch == batch else [slice(row, row + 1) for row in range(batch)]
        calls = [_Call(self, stages, row, given=given, batch=batch, reference=reference) for row in rows]
        for call in calls:
            call.run()
        results = {name: np.concatenate([call.known[name] for call in calls]) for name in calls[0].results}
        layers = {label: np.concatenate([call.layers[label] for call in calls]) for label in calls[0].layers}
        trace = {label: without_padding(np.asarray(v, np.float32), step, entry) for label, v in layers.items()}
        for name in self._program.states:
            if f"{name}.next" in results:
                self._states[name] = results[f"{name}.next"]
        trace |= {name: self._stored(name) for name in self._states}
        if calls[0].layer_by_layer:
            self._states |= {name: self._as_state(name, reference[name]) for name in self._states if name in reference}
        self._inputs.keep_hidden(step, {n: np.asarray(results[n], np.float32) for n in entry.outputs if n in results})
        return trace

    def _is_pairs(self, name: str) -> bool:
        """Whether a state is an FP8 cache, which graphs bind as pairs of codes in FP16."""
        return self._program.states[name].type.dtype is DType.F8E4M3 and self._states[name].dtype == np.float16

    def _stored(self, name: str) -> Array:
        """Return what a state holds, in float32."""
        value = self._states[name]
        if self._is_pairs(name):
            value = np.ascontiguousarray(value).view(ml_dtypes.float8_e4m3fn)
        return np.asarray(value, np.float32)

    def _as_state(self, name: str, value: Array) -> Array:
        """Return the values of a state, which its type holds exactly, as graphs bind it."""
        if self._is_pairs(name):
            return np.ascontiguousarray(value.astype(ml_dtypes.float8_e4m3fn)).view(np.float16)
        return value.astype(self._states[name].dtype)

    def state(self, name: str, dtype: np.dtype[Any], dims: tuple[int, ...], batch: int) -> Array:
        """Return a state of all sequences, [batch, *dims]: zeros when it is first asked for."""
        if name.endswith(".view"):  # the memory of a state in another type
            whole = self.state(name.removesuffix(".view"), np.dtype(np.float16), (*dims[:-1], dims[-1] // 2), batch)
            return np.ascontiguousarray(whole).view(dtype)
        if name not in self._states:
            if name not in self._program.states:
                raise KeyError(f"{name} is no input, weight or state")
            self._states[name] = np.zeros((batch, *dims), dtype)
        return self._states[name]


class _Call:
    """One call of an entry point for the sequences `row`: its stages, segment by segment."""

    def __init__(
        self,
        graphs: OnnxGraphs,
        stages: Sequence[Graph],
        row: slice,
        *,
        given: Mapping[str, Array],
        batch: int,
        reference: Trace,
    ) -> None:
        """`given` are the inputs of all `batch` sequences."""
        self._graphs, self._stages, self._row = graphs, stages, row
        self._given, self._batch, self._reference = given, batch, reference
        self.known: dict[str, Array] = {}
        self.layers: dict[str, Array] = {}
        """Label → what the layer gave."""
        self.results = [name for graph in stages for name in graph.outputs]
        self.layer_by_layer = any(segment.layer for graph in stages for segment in graph.segments)

    def run(self) -> None:
        """Run all stages; `known` has their outputs afterwards."""
        for graph in self._stages:
            for name, (dtype, shape) in graph.inputs.items():
                if name not in self.known:
                    self.known[name] = self._argument(name, dtype, shape)
            for segment in graph.segments:
                results = segment.evaluate({name: self.known[name] for name in segment.inputs})
                self.known.update(zip(segment.outputs, results, strict=True))
                if segment.layer:
                    self._go_on_from_reference(segment.layer, graph.layers[segment.layer])
            self.layers |= {
                label: self.known[value] for label, value in graph.layers.items() if label not in self.layers
            }

    def _argument(self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
        """Return a weight, an input or a state as a graph takes it."""
        if name in self._graphs.weights:
            return self._graphs.weights[name]
        if name in self._given:
            value = self._given[name]
            return value if name == "key_positions" else value[self._row].astype(dtype)
        return self._graphs.state(name, dtype, shape[1:], self._batch)[self._row]

    def _go_on_from_reference(self, label: str, value: str) -> None:
        """Note what a layer gave, and let the next one read what the reference gave; padding stays as it is."""
        own = self.layers[label] = self.known[value]
        if label in self._reference:
            right = self._reference[label][self._row]
            tokens = right.shape[1]
            self.known[value] = np.concatenate([right.astype(own.dtype), own[:, tokens:]], axis=1)


def _as_input(value: Array, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    """Return the bytes of a weight in the type of a graph input; FP4 codes one a byte, as numpy holds them."""
    raw = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
    if dtype == ml_dtypes.float4_e2m1fn:
        raw = np.stack((raw & 15, raw >> 4), axis=-1)
    return raw.reshape(-1).view(dtype).reshape(shape)
