"""The engine over a generated package: static inputs, states and weights on a device, entry points run over them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from n3c.backends.progress import SILENT, Progress
from n3c.backends.safetensors.checkpoint import Checkpoint
from n3c.backends.torch.emit import emit
from n3c.backends.torch.loading import load_package
from n3c.ir.program import Parameter
from n3c.ir.source import CacheScale
from n3c.passes.serving import Served
from n3c.runtime.engines.interface import KEY_POSITIONS, Allocation, Array, Port, Signature, Snapshot
from n3c.runtime.engines.signature import signature_of
from n3c.specs.dump import dump_spec
from n3c.specs.schema import Spec

from .graphs import Call, Graphs, Outputs, Recorder
from .model import PackedModel, stored_parameters
from .network import Network
from .operations import MakeOperations
from .plain import PlainOperations
from .states import Copied, States
from .weights import CheckpointWeights, WeightSource

HOST_TYPES = {"f32": torch.float32, "i64": torch.int64}
"""Types of what a caller gives and gets."""


class TorchEngine:
    """Runs entry points over packed weights.

    Activations have the type `dtype`, and are rounded in front of linears whose format says so. `prefill` is
    never recorded as a graph: it is bound by arithmetic, and reads another part of the caches each time.
    """

    def __init__(
        self,
        served: Served,
        spec: Spec,
        names: Sequence[str],
        batch_sizes: Sequence[int],
        weights: WeightSource,
        *,
        device: torch.device,
        dtype: torch.dtype,
        operations: MakeOperations = PlainOperations,
        recorder: Recorder | None = None,
        progress: Progress = SILENT,
    ) -> None:
        """Make the model on `device`, without a copy in host memory, and read its weights.

        States are float32 where `dtype` is, else of the types that the state plan says. Raises N3CError (exit code 6)
        where the weights do not fit, torch.OutOfMemoryError where the device has no room.
        """
        self.batch_sizes, self._device = sorted(batch_sizes), device
        self.batch = batch = self.batch_sizes[-1]
        program = served.program
        self.signatures: Mapping[str, Signature] = {
            name: _without_reach(signature_of(program, program.entry_points[name], batch)) for name in names
        }
        self._graphs = Graphs(recorder)
        self._broken = False
        with self._current():
            self._inputs = {
                (name, rows): _static(_without_reach(signature_of(program, program.entry_points[name], rows)), device)
                for name in names
                for rows in self.batch_sizes
            }
            self._staged = {key: _staged(tensors) for key, tensors in self._inputs.items()}
            package = load_package(emit(spec, hashlib.sha256(dump_spec(spec).encode()).hexdigest()))
            made = operations(package, spec)
            self._model = PackedModel(package, stored_parameters(spec), made, device)
            self._scales = _cache_scales(program.parameters.values(), device)
            scales = {parameter.name: tensor for parameter, tensor in self._scales}
            self._states = States(served.plan, batch, dtype, device, scales)
            self._networks = {
                rows: Network(self._model.module, self._model.head, made, self._states.rows(rows), dtype)
                for rows in self.batch_sizes
            }
        self.refill(weights, progress)

    @property
    def states(self) -> dict[str, Tensor]:
        """The states by name, [B, …] in the shapes of the state plan, where they lie."""
        return self._states.by_name()

    @property
    def unrecorded(self) -> Mapping[Call, str]:
        """Calls that run without a graph although there is a recorder, and why."""
        return self._graphs.refused

    def replay(self, entry: str) -> Callable[[], None] | None:
        """Return what launches the recorded graph of an entry point of all rows on the inputs that lie there, if any.

        It moves the states on as `run` does, and copies nothing to or from the host: to measure the device alone.
        """
        return self._graphs.replay((entry, self.batch))

    def run(self, entry: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run an entry point: by a graph from its second call on, where there is a recorder."""
        assert not self._broken, "replacing weights failed half-way: replace them again first"
        key = (entry, len(inputs["input_ids"]))
        with self._current():
            self._give(key, inputs)
            tensors, network = self._inputs[key], self._networks[key[1]]
            if entry != "prefill" and self._graphs.records(key):
                outputs = self._graphs.run(key, lambda: network.run(entry, tensors, None))
            else:
                lengths = inputs["lengths"].tolist() if "lengths" in tensors else None
                outputs = network.run(entry, tensors, lengths)
            return self._take(entry, outputs)

    def reset(self, sequences: Sequence[int] | None = None) -> None:
        """Zero the states of `sequences`, or all."""
        with self._current():
            self._states.reset(sequences)

    def snapshot(self, row: int, start: int, stop: int) -> Copied:
        """Copy the row of every state, on the device."""
        with self._current():
            return self._states.snapshot(row, slice(start, stop))

    def restore(self, row: int, snapshot: Snapshot) -> None:
        """Copy back."""
        assert isinstance(snapshot, Copied)
        with self._current():
            self._states.restore(row, snapshot)

    def replace_weights(self, checkpoint: Checkpoint) -> None:
        """Read other weights into the same tensors: graphs stay valid."""
        self.refill(CheckpointWeights(checkpoint))

    def refill(self, weights: WeightSource, progress: Progress = SILENT) -> None:
        """Read weights of any source into the same tensors, and reset the states."""
        self._broken = True
        with self._current():
            self._model.fill(weights, progress)
            for parameter, scale in self._scales:
                weights.fill(parameter, scale)
            self._states.reset()
        self._broken = False

    def allocated(self) -> Allocation:
        """Count states and weights; no state has a second place."""
        return Allocation(self._states.bytes, 0, self._model.bytes)

    @contextmanager
    def _current(self) -> Generator[None]:
        """Do without gradients, on the stream of the engine."""
        with torch.no_grad(), self._graphs.current():
            yield

    def _give(self, key: Call, inputs: Mapping[str, Array]) -> None:
        """Copy what a caller gives to the static inputs."""
        for name, tensor in self._inputs[key].items():
            staged = self._staged[key][name]
            staged.copy_(torch.as_tensor(np.ascontiguousarray(inputs[name])))
            if staged is not tensor:
                tensor.copy_(staged, non_blocking=True)

    def _take(self, entry: str, outputs: Outputs) -> dict[str, Array]:
        """Copy the outputs to the host, and wait for them."""
        pin = self._device.type == "cuda"
        taken: dict[str, Array] = {}
        for name, port in self.signatures[entry].outputs.items():
            host = torch.empty(outputs[name].shape, dtype=HOST_TYPES[port.dtype], pin_memory=pin)
            taken[name] = host.copy_(outputs[name], non_blocking=True).numpy()
        if pin:
            torch.cuda.current_stream(self._device).synchronize()
        return taken


def _without_reach(signature: Signature) -> Signature:
    """Return a signature without the input that bounds attention: this engine does that by `lengths`."""
    return Signature({n: port for n, port in signature.inputs.items() if n != KEY_POSITIONS}, signature.outputs)


def _static(signature: Signature, device: torch.device) -> dict[str, Tensor]:
    """Return tensors for the inputs of an entry point, which graphs read."""
    return {
        name: torch.zeros(_shape(p), dtype=HOST_TYPES[p.dtype], device=device) for name, p in signature.inputs.items()
    }


def _staged(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return where the host writes inputs: page-locked memory where they lie on a GPU, else the tensors themselves."""
    return {n: torch.empty_like(t, device="cpu", pin_memory=True) if t.is_cuda else t for n, t in tensors.items()}


def _shape(port: Port) -> tuple[int, ...]:
    return tuple(size for size in port.shape if isinstance(size, int))


def _cache_scales(parameters: Iterable[Parameter], device: torch.device) -> list[tuple[Parameter, Tensor]]:
    """Return the scales of FP8 caches, each with a tensor for it."""
    return [(p, torch.ones((), device=device)) for p in parameters if isinstance(p.source, CacheScale)]
