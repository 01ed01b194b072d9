"""Serve a program: entry points called with the states kept, by the reference evaluation or from ONNX files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnxruntime
import torch
from torch import Tensor

from n3c.backends.onnx.emit import OnnxEntry, emit_entry
from n3c.backends.safetensors.checkpoint import Checkpoint
from n3c.backends.safetensors.sources import load
from n3c.ir.program import Program
from n3c.ir.types import TensorType
from n3c.runtime.engines.reference.evaluate import evaluate, zero_states

from .onnx_run import Array, OnnxRunner


class Served:
    """A program with its parameters and the states of `batch` requests; `call` runs an entry point on them."""

    def __init__(self, program: Program, parameters: Mapping[str, Tensor], batch: int) -> None:
        self.program, self.parameters, self.batch = program, parameters, batch
        self.states = zero_states(program, batch)
        self.capacity = _capacity(program)

    def call(self, entry: str, **inputs: Tensor) -> dict[str, Tensor]:
        """Run `entry`, keep its next states, and return its outputs by name."""
        wanted = self.program.entry_points[entry].inputs
        known = {"key_positions": torch.arange(self.capacity), **inputs}
        outputs, states = self.run(entry, {name: known[name] for name in wanted})
        self.states.update(states)
        return outputs

    def run(self, entry: str, inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return outputs and next states by name."""
        point = self.program.entry_points[entry]
        result = evaluate(self.program, entry, inputs, self.parameters, self.states)
        used = {name for call in point.calls for name in call.states}
        states = {name: state for name, state in result.states.items() if name in used}
        return dict(zip(point.outputs, result.outputs, strict=True)), states

    def prefill(self, ids: Tensor, lengths: Tensor, chunk: int) -> dict[str, Tensor]:
        """Run the first `lengths` tokens of each row in chunks; return the last outputs of each sequence."""
        last: dict[str, Tensor] = {}
        for start in range(0, int(lengths.max()), chunk):
            counts = (lengths - start).clamp(0, chunk)
            piece = torch.nn.functional.pad(ids, (0, chunk + 1))[:, start : start + chunk + 1]
            done = torch.minimum(lengths, torch.tensor(start))
            outputs = self.call(
                "prefill", input_ids=piece[:, :-1], following_ids=piece[:, 1:], counts=counts, lengths=done
            )
            for name, value in outputs.items():
                kept = last.get(name, value)
                last[name] = torch.where((counts > 0)[:, None, None], value, kept)
        return last


def _capacity(program: Program) -> int:
    caches: list[TensorType] = [s.type for s in program.states.values() if s.kind == "kv"]
    sizes = [type_.dims[2] for type_ in caches]
    return next((size for size in sizes if isinstance(size, int)), 1)


class OnnxServed(Served):
    """The same by the very files that engines are built from, in the ONNX reference evaluator."""

    def __init__(self, program: Program, parameters: Mapping[str, Tensor], batch: int) -> None:
        super().__init__(program, parameters, batch)
        self._runners: dict[str, OnnxRunner] = {}

    def run(self, entry: str, inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if entry not in self._runners:
            self._runners[entry] = OnnxRunner(emit_entry(self.program, entry, batch=self.batch), self.parameters)
        outputs = self._runners[entry].run({**inputs, **self.states})
        states = {name: outputs.pop(name).to(s.dtype) for name, s in self.states.items() if name in outputs}
        return outputs, states


class RuntimeServed(Served):
    """The same by the float32 rendering, in ONNX Runtime on the CPU; `checkpoint` has the weights."""

    def __init__(self, program: Program, checkpoint: Checkpoint, batch: int) -> None:
        super().__init__(program, {}, batch)
        self.states = {name: state.float() for name, state in self.states.items()}
        self._checkpoint = checkpoint
        self._sessions: dict[str, tuple[OnnxEntry, Any, dict[str, Array]]] = {}

    def run(self, entry: str, inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        made, session, weights = self._session(entry)
        feeds: Any = {b.name: {**inputs, **self.states}[b.name].numpy() for b in made.arguments}
        results = session.run(None, feeds | weights)
        outputs = {b.source: torch.from_numpy(array) for b, array in zip(made.results, results, strict=True)}
        states = {name: outputs.pop(name) for name in self.states if name in outputs}
        return outputs, states

    def _session(self, entry: str) -> tuple[OnnxEntry, Any, dict[str, Array]]:
        if entry not in self._sessions:
            made = emit_entry(self.program, entry, batch=self.batch, rendering="float32")
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads, options.log_severity_level = 1, 3
            session = onnxruntime.InferenceSession(made.to_bytes(), options, providers=["CPUExecutionProvider"])
            weights = {b.name: load(p, self._checkpoint) for b, p in zip(made.weights, made.parameters, strict=True)}
            self._sessions[entry] = made, session, weights
        return self._sessions[entry]
