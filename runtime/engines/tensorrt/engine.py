"""Plans on GPUs: the engine interface over TensorRT's runtime; n3c owns the memory of weights and states.

The plans of a GPU read the same buffers: one for each weight, one piece for the states of all sequences, laid out
as the state plan says. Caches are written in place, as TensorRT's cache layer demands; of every other state there
are two buffers that change places. Stages may lie on several GPUs; between them passes the residual stream. A call
only sets addresses and enqueues; from its second time on with the same addresses it is a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from n3c.backends.onnx.bindings import Binding, parameter_of
from n3c.backends.progress import SILENT, Progress
from n3c.backends.safetensors.checkpoint import Checkpoint
from n3c.backends.safetensors.sources import load
from n3c.ir.program import Parameter
from n3c.passes.state_layout import StatePlan
from n3c.runtime.engines.interface import KEY_POSITIONS, Allocation, Array, Port, Signature, Snapshot, key_positions

from .contexts import Contexts, refused
from .device import Device, Memory
from .memory import DeviceMemory, memory_of

HOST_DTYPES: Mapping[str, type[np.generic]] = {"f32": np.float32, "i64": np.int64}
"""Types of what a caller gives and gets."""
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
    stage: int = 0


@dataclass(slots=True)
class _Loaded:
    """A plan in the runtime, on the GPU whose memory it reads."""

    plan: Plan
    context: Any
    memory: DeviceMemory
    graphs: dict[tuple[int, ...], Callable[[], None] | None] = field(
        default_factory=dict[tuple[int, ...], Callable[[], None] | None]
    )
    """Addresses of a call → its CUDA graph; None: it has run once without one. A buffer has one size, so they say the
    sizes too."""


@dataclass(frozen=True, slots=True)
class Copied:
    """States of a sequence: a piece of memory on each device."""

    places: range
    """Of its caches."""
    memories: Sequence[Memory]

    @property
    def bytes(self) -> int:
        """Memory of the pieces."""
        return sum(memory.bytes for memory in self.memories)


class TrtEngine:
    """Runs plans; an entry point that has none of a call's batch size, as `prefill`, takes sequence by sequence."""

    def __init__(
        self,
        trt: Any,
        devices: Sequence[Device],
        plans: Sequence[Plan],
        parameters: Mapping[str, Parameter],
        checkpoint: Checkpoint,
        state_plan: StatePlan,
        *,
        batch_sizes: Sequence[int],
        progress: Progress = SILENT,
    ) -> None:
        """Load `plans` (stages of an entry point in their order) and stream the weights to `devices`.

        Stages lie on the devices in their order, as evenly as they divide. `trt` is a module of `load_trt`;
        `parameters` are those of the program, by name. Raises N3CError: exit code 4 where the runtime refuses a
        plan or a device has no room, 6 where the checkpoint does not fit.
        """
        self.batch_sizes, self._capacity = sorted(batch_sizes), state_plan.max_seq_len
        self.batch = batch = self.batch_sizes[-1]
        self._broken = False
        self._logger = trt.Logger(trt.Logger.ERROR)
        self._contexts: list[Contexts] = []
        self._new = False
        """Whether a plan has run for the first time since the kernels were saved."""
        loaded: dict[Path, _Loaded] = {}
        self._memories: list[DeviceMemory] = []
        self._parameters: dict[str, Parameter] = {}
        for device, placed in zip(devices, spread(plans, len(devices)), strict=True):
            with device.current():
                self._contexts.append(Contexts(trt, self._logger, device, [plan.path for plan in placed]))
                weights = {memory_of(b): b for plan in placed for b in plan.weights}
                self._parameters |= {memory: parameters[parameter_of(b.name)] for memory, b in weights.items()}
                states = {b.source for plan in placed for b in plan.inputs if b.kind == "state"}
                planned = [state for state in state_plan.states if state.name in states]
                self._memories.append(DeviceMemory(device, weights.values(), planned, batch))
            for plan, context in zip(placed, self._contexts[-1].contexts, strict=True):
                loaded[plan.path] = _Loaded(plan, context, self._memories[-1])
        self._load(checkpoint, progress)
        self._entries: dict[tuple[str, int], list[_Loaded]] = {}
        for plan in plans:
            self._entries.setdefault((plan.entry, plan.batch), []).append(loaded[plan.path])
        self.signatures: Mapping[str, Signature] = {
            name: _signature([loaded.plan for loaded in stages], batch) for (name, _), stages in self._entries.items()
        }

    def run(self, entry: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run an entry point; where its plan is of batch 1 alone, once for each sequence that has tokens in it."""
        assert not self._broken, "replacing weights failed half-way: replace them again first"
        signature, rows = self.signatures[entry], len(inputs["input_ids"])
        whole = {**inputs, **key_positions(signature, inputs, self._capacity, BUCKET)}
        stages = self._entries.get((entry, rows))
        if stages is not None:
            outputs = self._call(stages, whole, None)
        else:
            outputs = self._one_by_one(entry, whole, np.flatnonzero(inputs["counts"]).tolist())
        if self._new:
            self._new = False
            for contexts in self._contexts:
                contexts.save()
        return outputs

    def _one_by_one(self, entry: str, inputs: Mapping[str, Array], rows: Sequence[int]) -> dict[str, Array]:
        """Run plans of batch 1 for each of `rows`; outputs of other sequences are zeros."""
        count, ports = len(inputs["input_ids"]), self.signatures[entry].outputs
        outputs = {name: np.zeros((count, *_static(p)[1:]), HOST_DTYPES[p.dtype]) for name, p in ports.items()}
        for row in rows:
            part = {name: v if name == KEY_POSITIONS else v[row : row + 1] for name, v in inputs.items()}
            for name, value in self._call(self._entries[entry, 1], part, row).items():
                outputs[name][row] = value[0]
        return outputs

    def reset(self, sequences: Sequence[int] | None = None) -> None:
        """Zero the states of `sequences`, or all."""
        for memory in self._memories:
            memory.reset(sequences)

    def snapshot(self, row: int, start: int, stop: int) -> Copied:
        """Copy the row of every state, on its device."""
        places = range(start, stop)
        return Copied(places, [memory.snapshot(row, places) for memory in self._memories])

    def restore(self, row: int, snapshot: Snapshot) -> None:
        """Copy back."""
        assert isinstance(snapshot, Copied)
        for memory, copied in zip(self._memories, snapshot.memories, strict=True):
            memory.restore(row, snapshot.places, copied)

    def replace_weights(self, checkpoint: Checkpoint) -> None:
        """Stream other weights into the same buffers."""
        self._load(checkpoint, SILENT)
        self.reset()

    def allocated(self) -> Allocation:
        """Count the buffers, of all devices."""
        weights = sum(weight.bytes for memory in self._memories for weight in memory.weights.values())
        states = sum(memory.arena.bytes for memory in self._memories)
        return Allocation(states, sum(memory.spare.bytes for memory in self._memories), weights)

    def _load(self, checkpoint: Checkpoint, progress: Progress) -> None:
        self._broken = True
        for i, (name, parameter) in enumerate(self._parameters.items()):
            value = load(parameter, checkpoint)
            for memory in self._memories:
                if name in memory.weights:
                    assert value.nbytes == memory.weights[name].bytes, parameter.name
                    memory.device.write(memory.weights[name], 0, value)
            progress.step(parameter.name, i + 1, len(self._parameters))
        self._broken = False

    def _call(self, stages: Sequence[_Loaded], inputs: Mapping[str, Array], row: int | None) -> dict[str, Array]:
        """Run the stages one after the other; what passes between them stays on the devices."""
        made: dict[str, tuple[_Loaded, Binding]] = {}
        for stage in stages:
            self._enqueue(stage, inputs, made, row)
            made.update((b.name, (stage, b)) for b in stage.plan.outputs if b.kind == "output")
        read = {b.name for stage in stages for b in stage.plan.inputs}
        results = {name: _fetch(stage.memory, b) for name, (stage, b) in made.items() if name not in read}
        for memory in self._memories:
            written = {b.source for s in stages if s.memory is memory for b in s.plan.outputs if b.kind == "state"}
            for name in written:
                memory.states[name].move_on(memory.device, row)
        return results

    def _enqueue(
        self,
        stage: _Loaded,
        inputs: Mapping[str, Array],
        made: Mapping[str, tuple[_Loaded, Binding]],
        row: int | None,
    ) -> None:
        """Bind all inputs and outputs of a plan and put it on the stream of its device."""
        plan, context, memory = stage.plan, stage.context, stage.memory
        places: list[tuple[str, int]] = [(b.name, memory.weights[memory_of(b)].address) for b in plan.weights]
        for binding in plan.inputs:
            if binding.kind in ("state", "view"):  # a view is the memory of the state in another type
                places.append((binding.name, memory.state_address(binding.source, row, after=False)))
                continue
            if binding.name in made:
                places.append((binding.name, _received(memory, *made[binding.name]).address))
                continue
            value = np.ascontiguousarray(inputs[binding.name], HOST_DTYPES[binding.dtype])
            buffer = memory.buffer(binding, value.shape)
            memory.device.write(buffer, 0, value)
            places.append((binding.name, buffer.address))
            if -1 in binding.shape:
                _require(context.set_input_shape(binding.name, value.shape), plan, f"refuses {value.shape}")
        for binding in plan.outputs:
            if binding.kind == "state":
                places.append((binding.name, memory.state_address(binding.source, row, after=True)))
            else:
                places.append((binding.name, memory.buffer(binding, binding.shape).address))
        for name, address in places:
            _require(context.set_tensor_address(name, address), plan, f"refuses the address of `{name}`")
        self._new |= not stage.graphs
        with memory.device.current():
            _launch(stage, tuple(address for _, address in places))


def spread(plans: Sequence[Plan], devices: int) -> list[list[Plan]]:
    """Return the plans of each device: stages in their order, as evenly as they divide, the first ones taking more."""
    count = 1 + max(plan.stage for plan in plans)
    return [[plan for plan in plans if plan.stage * devices // count == index] for index in range(devices)]


def _launch(stage: _Loaded, key: tuple[int, ...]) -> None:
    """Execute, by a CUDA graph where the very same call has run before and the runtime allows one."""
    device = stage.memory.device

    def execute() -> None:
        _require(stage.context.execute_async_v3(device.stream), stage.plan, "fails to execute")

    if key not in stage.graphs or not _capturable(stage):
        execute()
        stage.graphs[key] = None
        return
    graph = stage.graphs[key] or device.capture(execute)
    stage.graphs[key] = graph
    graph()


def _capturable(stage: _Loaded) -> bool:
    """Whether a call may become a CUDA graph; TensorRT without that question allows it."""
    asked = getattr(stage.context, "is_stream_capturable", None)
    return asked is None or bool(asked(stage.memory.device.stream))


def _received(memory: DeviceMemory, maker: _Loaded, binding: Binding) -> Memory:
    """Return where a result of an earlier stage lies on this device."""
    theirs = maker.memory.buffer(binding, binding.shape)
    if maker.memory is memory:
        return theirs
    ours = memory.buffer(binding, binding.shape)
    memory.device.receive(ours, maker.memory.device, theirs)
    return ours


def _fetch(memory: DeviceMemory, binding: Binding) -> Array:
    buffer = memory.buffer(binding, binding.shape)
    data = memory.device.read(buffer, 0, buffer.bytes)
    return np.frombuffer(data, HOST_DTYPES[binding.dtype]).reshape(binding.shape)


def _require(done: bool, plan: Plan, what: str) -> None:
    if not done:
        raise refused(plan.path, what)


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
