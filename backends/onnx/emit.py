"""Emit an entry point as an ONNX graph with bound weights: parameters and states are graph inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as onnx

from n3c.backends.progress import SILENT, Progress
from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError, Span
from n3c.ir.extensions import part
from n3c.ir.formats import as_bytes
from n3c.ir.program import Call, EntryPoint, Function, Parameter, Program
from n3c.ir.source import Bytes
from n3c.ir.types import DType, TensorType
from n3c.passes.base import run_pipeline
from n3c.passes.widen import Widen

from .bindings import BYTES, Binding
from .emitter import Emitter, Rendering
from .entry_forms import LinearForms, fastest_for, has_wide_products
from .graph import GraphBuilder
from .linear_forms import Choose
from .linears import Linear, linears_of
from .registry import SPELLINGS

PRODUCER = "n3c"
DYNAMIC = -1
"""In the shape of a binding: a length that is chosen at every call."""
USUAL = 8192
"""Places of the caches that kernels are chosen for, where there are so many."""


@dataclass(frozen=True, slots=True)
class OnnxEntry:
    """An entry point in ONNX, and what its inputs, outputs and linears are."""

    name: str
    batch: int
    model: onnx.Model
    weights: tuple[Binding, ...]
    """Parameters, in the order of the calls that read them."""
    arguments: tuple[Binding, ...]
    """The other graph inputs: the entry's inputs, then the states."""
    results: tuple[Binding, ...]
    """Graph outputs: the entry's outputs, then `<state>.next` of every state."""
    linears: tuple[Linear, ...]
    spans: Mapping[str, Span]
    """Label of a call (the first part of its nodes' names) → the spec line of its block."""
    parameters: tuple[Parameter, ...]
    """The parameters of the weights, in their order: `n3c.backends.safetensors.sources.load` gives the values."""
    dynamic_inputs: Mapping[str, tuple[int, int, int]]
    """Inputs of one dim that is chosen at every call → its least, usual and greatest size."""

    @property
    def bindings(self) -> list[dict[str, Any]]:
        """The weights as rows of bindings.json."""
        return [binding.as_json() for binding in self.weights]

    @property
    def inputs(self) -> list[dict[str, Any]]:
        """The other inputs as rows of bindings.json."""
        return [binding.as_json() for binding in self.arguments]

    @property
    def outputs(self) -> list[dict[str, Any]]:
        """The outputs as rows of bindings.json."""
        return [binding.as_json() for binding in self.results]

    @property
    def output_names(self) -> frozenset[str]:
        """Names of the graph outputs."""
        return frozenset(binding.name for binding in self.results)

    def to_bytes(self) -> bytes:
        """Return the serialised model. It holds no weights, so it is small."""
        data: bytes = onnx.to_proto(self.model).SerializeToString(deterministic=True)
        return data

    def to_nameless_bytes(self) -> bytes:
        """Return the serialised model without the names that leave no trace in a plan: its own and its producer's."""
        proto = onnx.to_proto(self.model)
        proto.graph.name = proto.producer_name = ""
        data: bytes = proto.SerializeToString(deterministic=True)
        return data

    def save(self, path: Path) -> int:
        """Write the model and return its size in bytes."""
        return path.write_bytes(self.to_bytes())

    def locate(self, node: str) -> Span | None:
        """Return the spec line that a node, by its name, comes from."""
        return self.spans.get(node.partition("/")[0])


def emit_entry(
    program: Program,
    entry_point: str | EntryPoint,
    *,
    batch: int,
    tokens: int | None = None,
    rendering: Rendering = "engine",
    choose: Choose | None = None,
    progress: Progress = SILENT,
) -> OnnxEntry:
    """Emit an entry point, by name or a stage of one, for `batch` sequences of `tokens` tokens (its own), both fixed.

    Static dims make plans an eighth of the size, and 3 times faster to build, than dynamic ones. The
    rendering `float32` has dequantized weights and float32 states, and runs in ONNX Runtime on a CPU. `choose` chooses
    the forms of linears: those that are fastest on GPUs of SM 120 if it is left out.
    N3CError (E0507) for an op that no spelling is registered for.
    """
    entry = program.entry_points[entry_point] if isinstance(entry_point, str) else entry_point
    if rendering == "float32":
        program = program.extract(entry)
        run_pipeline(program, [Widen()])
        entry = program.entry_points[entry.name]
    dims = {"B": batch, "S": tokens or entry.tokens}
    return _Emission(program, entry, dims, rendering, choose or fastest_for(program)).run(progress)


class _Emission:
    def __init__(
        self, program: Program, entry: EntryPoint, dims: dict[str, int], rendering: Rendering, choose: Choose
    ) -> None:
        self.program, self.entry, self.dims = program, entry, dims
        self.graph = GraphBuilder(f"{program.name}.{entry.name}")
        self.forms = LinearForms(program, entry, dims, choose)
        self.emitter = Emitter(self.graph, dims, self.forms.of, rendering, wide=has_wide_products(program))
        self.values: dict[str, onnx.Value] = {}
        self.types: dict[str, TensorType] = {}
        self.next_states: dict[str, onnx.Value] = {}
        self.spans: dict[str, Span] = {}

    def run(self, progress: Progress) -> OnnxEntry:
        program, calls = self.program, self.entry.calls
        states = [name for call in calls for name in call.states]
        arguments = [self.argument(name, type_, "input", name) for name, type_ in self.entry.inputs.items()]
        for name in states:
            type_ = program.states[name].type
            arguments.append(self.argument(name, bound_as(type_), "state", name))
            if bound_as(type_) != type_:
                arguments.append(self.argument(f"{name}.view", type_, "view", name))
        bound = [self.parameters(call) for call in calls]
        parameters = list({parameter.name: parameter for of_call in bound for parameter in of_call}.values())
        weights = [self.argument(p.name, p.type, "weight", str(p.source), p.memory) for p in parameters]
        for i, (call, of_call) in enumerate(zip(calls, bound, strict=True)):
            self.call(call, of_call)
            progress.step(call.label, i + 1, len(calls))
        results = [self.result(n, self.values[n], self.types[n], "output", n) for n in self.entry.outputs]
        results += [
            self.result(f"{name}.next", self.next_states[name], bound_as(program.states[name].type), "state", name)
            for name in states
        ]
        return OnnxEntry(
            name=self.entry.name,
            batch=self.dims["B"],
            model=self.graph.model(PRODUCER),
            weights=tuple(weights),
            arguments=tuple(arguments),
            results=tuple(results),
            linears=linears_of(program, self.entry, self.dims, self.forms),
            spans=self.spans,
            parameters=tuple(parameters),
            dynamic_inputs=self.dynamic(),
        )

    def parameters(self, call: Call) -> list[Parameter]:
        """Return what a call binds: its parameters, those that are read as bytes under a name of their own."""
        function = self.program.functions[call.function]
        codes = {id(value) for node in function.nodes if (value := self.forms.read_as_bytes(node)) is not None}
        bound = (self.program.parameters[name] for name in call.parameters)
        return [
            _as_bytes(parameter) if id(formal) in codes else parameter
            for formal, parameter in zip(function.parameters, bound, strict=True)
        ]

    def argument(self, name: str, type_: TensorType, kind: str, source: str, memory: str = "") -> Binding:
        """Declare a graph input."""
        bound = type_.bind(self.dims)
        self.values[name] = self.graph.input(name, bound.dtype, bound.dims)
        shape = tuple(d if isinstance(d, int) else DYNAMIC for d in bound.dims)
        return Binding(name, kind, bound.dtype.value, shape, source, memory)

    def dynamic(self) -> dict[str, tuple[int, int, int]]:
        """Return least, usual and greatest length of each dynamic input: what is attended to."""
        names = [
            name for name, type_ in self.entry.inputs.items() if not isinstance(type_.bind(self.dims).dims[0], int)
        ]
        states = [self.program.states[name] for call in self.entry.calls for name in call.states]
        capacity = max((s.type.bind(self.dims).static_dims[2] for s in states if s.kind == "kv"), default=0)
        return {name: (self.dims["S"], max(self.dims["S"], min(USUAL, capacity)), capacity) for name in names}

    def result(self, name: str, value: onnx.Value, type_: TensorType, kind: str, source: str) -> Binding:
        """Declare a graph output."""
        static = type_.bind(self.dims)
        self.graph.output(value, name, static.dtype, static.static_dims)
        return Binding(name, kind, static.dtype.value, static.static_dims, source)

    def call(self, call: Call, parameters: Sequence[Parameter]) -> None:
        """Emit the nodes of one call, which binds `parameters`, under its label."""
        function = self.program.functions[call.function]
        self.graph.scope = f"{call.label}/"
        if call.origin.span is not None:
            self.spans.setdefault(call.label, call.origin.span)
        formals = (*function.inputs, *function.parameters, *function.states)
        names = (parameter.name for parameter in parameters)
        for formal, actual in zip(formals, (*call.inputs, *names, *call.states), strict=True):
            self.emitter.bind(formal, self.values[actual])
        for formal, actual in zip(function.states, call.states, strict=True):
            if f"{actual}.view" in self.values:
                self.emitter.bind_view(formal, self.values[f"{actual}.view"])
        self.nodes(function)
        for name, value in zip(call.outputs, function.outputs, strict=True):
            self.values[name] = self.emitter.get(value)
            self.types[name] = value.type
        for name, value in zip(call.states, function.next_states, strict=True):
            self.next_states[name] = self.emitter.get(value)

    def nodes(self, function: Function) -> None:
        """Emit the nodes of a function whose formals are bound."""
        for node in function.nodes:
            spelling = part(node.op.spelling) if node.op.spelling else SPELLINGS.get(node.op.name)
            if spelling is None:
                message = f"`{node.op.name}` in @{function.name} has no ONNX spelling"
                raise N3CError(
                    Diagnostic("E0507", message, node.origin.span, help="run the serving passes first"), ExitCode.TARGET
                )
            spelling(self.emitter, node)


def _as_bytes(parameter: Parameter) -> Parameter:
    """Return the same memory as bytes."""
    return replace(
        parameter, name=parameter.name + BYTES, type=as_bytes(parameter.type), source=Bytes(parameter.source)
    )


def bound_as(type_: TensorType) -> TensorType:
    """Return the type in which an engine updates a state: two FP8 codes as one FP16 element, others as they are."""
    if type_.dtype is not DType.F8E4M3:
        return type_
    last = type_.dims[-1]
    assert isinstance(last, int)
    return type_.with_dtype(DType.F16).with_last(last // 2)
