"""Plans on a GPU: the engine interface over TensorRT's runtime, with weights and states in memory of ours.

Every plan reads the same device buffers: one for each weight, one piece for the states of all sequences, laid
out as the state plan says. Caches are written in place, as TensorRT's cache layer demands; of every other state
there are two buffers that change places. A call only sets addresses and enqueues; from its second time on with
the same addresses and sizes it is a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from n3c.backends.engine import KEY_POSITIONS, Allocation, Array, Port, Signature, key_positions
from n3c.backends.onnx.bindings import Binding
from n3c.backends.safetensors.checkpoint import Checkpoint
from n3c.backends.safetensors.sources import load
from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError, Span
from n3c.ir.program import Parameter
from n3c.passes.state_plan import ALIGNMENT, StatePlan

from .device import Device, Memory

HOST_DTYPES: Mapping[str, type[np.generic]] = {"f32": np.float32, "i64": np.int64}
"""Types of what a caller gives and gets."""
BITS = {"f32": 32, "f16": 16, "bf16": 16, "f8e4m3": 8, "f4e2m1": 4, "i64": 64, "i32": 32, "i8": 8}
BUCKET = 256
"""Tokens: attention reads up to a multiple of them, so that a CUDA graph serves that many positions."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One plan file and what it binds."""

    path: Path
    entry: str
    batch: int
    inputs: tuple[Binding, ...]
    """Inputs and states."""
    outputs: tuple[Binding, ...]
    weights: tuple[Binding, ...]


@dataclass(slots=True)
class _Loaded:
    """A plan in the runtime."""

    plan: Plan
    context: Any
    graphs: dict[tuple[int, ...], Callable[[], None] | None] = field(
        default_factory=dict[tuple[int, ...], Callable[[], None] | None]
    )
    """Addresses and sizes of a call → its CUDA graph; None: it has run once without one."""


@dataclass(slots=True)
class _StateBuffers:
    """Where a state of all sequences lies, [B, …], and where a call writes it; caches have one place for both."""

    bytes: int
    """Of one sequence."""
    now: tuple[Memory, int]
    after: tuple[Memory, int]

    @property
    def in_place(self) -> bool:
        return self.now == self.after


class TrtEngine:
    """Runs the plans of one batch size; `prefill` may be of batch 1, and then takes sequence by sequence."""

    def __init__(
        self,
        trt: Any,
        device: Device,
        plans: Sequence[Plan],
        parameters: Mapping[str, Parameter],
        checkpoint: Checkpoint,
        state_plan: StatePlan,
        *,
        batch: int,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        """Load `plans` (stages of an entry point in their order) and stream the weights to the device.

        `trt` is a module of `load_trt`; `parameters` are those of the program, by name. Raises N3CError: exit code
        4 where the runtime refuses a plan or the device has no room, 6 where the checkpoint does not fit.
        """
        self.batch, self._device, self._capacity = batch, device, state_plan.max_seq_len
        self._broken = False
        self._logger = trt.Logger(trt.Logger.ERROR)
        self._runtime = trt.Runtime(self._logger)  # engines need it to live as long as they do
        self._entries: dict[str, list[_Loaded]] = {}
        for plan in plans:
            self._entries.setdefault(plan.entry, []).append(_Loaded(plan, _context(self._runtime, plan)))
        self._arena = device.allocate(batch * state_plan.total_bytes)
        self._spare, self._states = _placed(device, self._arena, state_plan, batch)
        weights = {_memory(b): b for plan in plans for b in plan.weights}
        self._parameters = {memory: parameters[binding.name] for memory, binding in weights.items()}
        self._weights = {memory: device.allocate(_bytes(binding)) for memory, binding in weights.items()}
        self._load(checkpoint, progress)
        self._buffers: dict[tuple[str, int], Memory] = {}
        self.signatures: Mapping[str, Signature] = {
            name: _signature([loaded.plan for loaded in stages], batch) for name, stages in self._entries.items()
        }

    def run(self, entry: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run an entry point; where its plan is of batch 1, once for each sequence that has tokens in it."""
        assert not self._broken, "replacing weights failed half-way: replace them again first"
        stages, signature = self._entries[entry], self.signatures[entry]
        whole = {**inputs, **key_positions(signature, inputs, self._capacity, BUCKET)}
        if stages[0].plan.batch == self.batch:
            return self._call(stages, whole, None)
        outputs = {name: np.zeros(_static(port), HOST_DTYPES[port.dtype]) for name, port in signature.outputs.items()}
        for row in np.flatnonzero(inputs["counts"]).tolist():
            part = {name: v if name == KEY_POSITIONS else v[row : row + 1] for name, v in whole.items()}
            for name, value in self._call(stages, part, row).items():
                outputs[name][row] = value[0]
        return outputs

    def reset(self) -> None:
        """Zero all states, in both of their places."""
        self._device.zero(self._arena)
        self._device.zero(self._spare)

    def replace_weights(self, checkpoint: Checkpoint) -> None:
        """Stream other weights into the same buffers."""
        self._load(checkpoint, None)
        self.reset()

    def allocated(self) -> Allocation:
        """Count the buffers."""
        weights = sum(memory.bytes for memory in self._weights.values())
        return Allocation(self._arena.bytes, self._spare.bytes, weights)

    def _load(self, checkpoint: Checkpoint, progress: Callable[[str, int, int], None] | None) -> None:
        self._broken = True
        for i, (memory, parameter) in enumerate(self._parameters.items()):
            value = load(parameter, checkpoint)
            assert value.nbytes == self._weights[memory].bytes, parameter.name
            self._device.write(self._weights[memory], 0, value)
            if progress is not None:
                progress(parameter.name, i + 1, len(self._parameters))
        self._broken = False

    def _call(self, stages: Sequence[_Loaded], inputs: Mapping[str, Array], row: int | None) -> dict[str, Array]:
        """Run the stages one behind the other; what passes between them stays on the device."""
        for stage in stages:
            self._enqueue(stage, inputs, row)
        outputs = {b.name: b for stage in stages for b in stage.plan.outputs if b.kind == "output"}
        read = {b.name for stage in stages for b in stage.plan.inputs}
        results = {name: self._fetch(binding) for name, binding in outputs.items() if name not in read}
        for name in dict.fromkeys(b.source for s in stages for b in s.plan.outputs if b.kind == "state"):
            state = self._states[name]
            if state.in_place:
                continue
            if row is None:
                state.now, state.after = state.after, state.now
            else:  # the other rows are where they were, so this one comes back to them
                (memory, at), (spare, there) = state.now, state.after
                self._device.copy(memory, at + row * state.bytes, spare, there + row * state.bytes, state.bytes)
        return results

    def _enqueue(self, stage: _Loaded, inputs: Mapping[str, Array], row: int | None) -> None:
        """Bind all inputs and outputs of a plan and put it on the stream."""
        plan, context = stage.plan, stage.context
        places: list[tuple[str, int]] = [(b.name, self._weights[_memory(b)].address) for b in plan.weights]
        sizes: list[int] = []
        for binding in plan.inputs:
            if binding.kind in ("state", "view"):  # a view is the memory of the state in another type
                places.append((binding.name, self._state_address(binding.source, row, after=False)))
                continue
            if binding.name not in inputs:  # from an earlier stage
                places.append((binding.name, self._buffer(binding, binding.shape).address))
                continue
            value = np.ascontiguousarray(inputs[binding.name], HOST_DTYPES[binding.dtype])
            buffer = self._buffer(binding, value.shape)
            self._device.write(buffer, 0, value)
            places.append((binding.name, buffer.address))
            if -1 in binding.shape:
                _require(context.set_input_shape(binding.name, value.shape), plan, f"refuses {value.shape}")
                sizes += value.shape
        for binding in plan.outputs:
            if binding.kind == "state":
                places.append((binding.name, self._state_address(binding.source, row, after=True)))
            else:
                places.append((binding.name, self._buffer(binding, binding.shape).address))
        for name, address in places:
            _require(context.set_tensor_address(name, address), plan, f"refuses the address of `{name}`")
        self._launch(stage, (*(address for _, address in places), *sizes))

    def _launch(self, stage: _Loaded, key: tuple[int, ...]) -> None:
        """Execute, by a CUDA graph where the very same call has run before: the first one may allocate."""

        def execute() -> None:
            _require(stage.context.execute_async_v3(self._device.stream), stage.plan, "fails to execute")

        if key not in stage.graphs:
            execute()
            stage.graphs[key] = None
            return
        graph = stage.graphs[key] or self._device.capture(execute)
        stage.graphs[key] = graph
        graph()

    def _state_address(self, name: str, row: int | None, *, after: bool) -> int:
        state = self._states[name]
        memory, offset = state.after if after else state.now
        return memory.address + offset + (row or 0) * state.bytes

    def _buffer(self, binding: Binding, shape: Sequence[int]) -> Memory:
        """Return the buffer of an input or output; one for each size, so that addresses stay."""
        size = max(1, prod(shape) * BITS[binding.dtype] // 8)
        key = (binding.name, size)
        if key not in self._buffers:
            self._buffers[key] = self._device.allocate(size)
        return self._buffers[key]

    def _fetch(self, binding: Binding) -> Array:
        memory = self._buffer(binding, binding.shape)
        data = self._device.read(memory, 0, memory.bytes)
        return np.frombuffer(data, HOST_DTYPES[binding.dtype]).reshape(binding.shape)


def _context(runtime: Any, plan: Plan) -> Any:
    """Return an execution context of a plan; N3CError (E0812, exit code 4) where the runtime refuses it."""
    engine = runtime.deserialize_cuda_engine(plan.path.read_bytes())
    context = engine.create_execution_context() if engine is not None else None
    if context is None:
        raise _refused(plan, "is refused by the runtime: built for another TensorRT version or GPU, or damaged")
    return context


def _require(done: bool, plan: Plan, what: str) -> None:
    if not done:
        raise _refused(plan, what)


def _refused(plan: Plan, what: str) -> N3CError:
    help_ = "build the plan again on this machine; TensorRT has said more on stderr"
    return N3CError(Diagnostic("E0812", f"the plan {what}", Span(str(plan.path)), help=help_), ExitCode.TARGET)


def _placed(device: Device, arena: Memory, plan: StatePlan, batch: int) -> tuple[Memory, dict[str, _StateBuffers]]:
    """Give every state its place in `arena`, and a second one in spare memory unless it is a cache."""
    offsets: dict[str, int] = {}
    end = 0
    for state in plan.states:
        if state.kind != "kv":
            offsets[state.name] = end
            end += -(-batch * state.bytes // ALIGNMENT) * ALIGNMENT
    spare = device.allocate(end)
    return spare, {
        s.name: _StateBuffers(
            s.bytes,
            (arena, batch * s.offset),
            (spare, offsets[s.name]) if s.name in offsets else (arena, batch * s.offset),
        )
        for s in plan.states
    }


def _memory(binding: Binding) -> str:
    """Return what names the bytes of a weight: plans bind the same ones as different types."""
    return binding.memory or binding.name


def _bytes(binding: Binding) -> int:
    return prod(binding.shape) * BITS[binding.dtype] // 8


def _signature(stages: Sequence[Plan], batch: int) -> Signature:
    """Return what the stages together take and give, for `batch` sequences whatever their own batch is."""
    made = {b.name for stage in stages for b in stage.outputs}
    read = {b.name for stage in stages for b in stage.inputs}
    own = stages[0].batch

    def ports(bindings: Iterable[Binding]) -> dict[str, Port]:
        return {b.name: Port(b.dtype, tuple(_dim(b, i, own, batch) for i in range(len(b.shape)))) for b in bindings}

    return Signature(
        ports(b for stage in stages for b in stage.inputs if b.kind == "input" and b.name not in made),
        ports(b for stage in stages for b in stage.outputs if b.kind == "output" and b.name not in read),
    )


def _dim(binding: Binding, index: int, own: int, batch: int) -> int | str:
    size = binding.shape[index]
    if size < 0:
        return binding.name
    return batch if index == 0 and size == own else size


def _static(port: Port) -> tuple[int, ...]:
    return tuple(size for size in port.shape if isinstance(size, int))
