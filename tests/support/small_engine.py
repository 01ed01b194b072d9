"""A small model with every block kind but the MLP, and the engines that run it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from n3c.backends.safetensors.checkpoint import Checkpoint
from n3c.backends.torch.emit import emit
from n3c.backends.torch.loading import load_package
from n3c.passes.lower.model import lower
from n3c.passes.serving import Served, serve
from n3c.runtime.engines.choice import EngineName
from n3c.runtime.engines.interface import Array, Engine
from n3c.runtime.engines.onnxruntime.open import cpu_engine
from n3c.runtime.engines.reference.engine import ReferenceEngine
from n3c.runtime.engines.torch.open import torch_engine
from n3c.runtime.engines.torch.weights import CheckpointWeights
from n3c.runtime.generation.capacity import Capacity
from n3c.runtime.generation.drafter import Drafter
from n3c.runtime.generation.loop import Generation
from n3c.runtime.generation.sequence import Options
from n3c.specs.schema import Spec
from support.programs import random_tensors, save_tensors
from support.specs import SMALL, spec_from_text

TEXT = SMALL.replace(
    "max_seq_len = 32", 'max_seq_len = 48\nprefill_chunk = 8\ndraft_tokens = 2\nactivations = "weight_only"'
).replace('"MEM*E-ME"', '"MEM*-E"')
"""Weight-only, so that engines agree to the order of sums: a rounding that this tips would show as a difference."""


@dataclass
class SmallModel:
    spec: Spec
    served: Served
    checkpoint: Checkpoint

    def engine(self, name: EngineName, *batch_sizes: int, checkpoint: Checkpoint | None = None) -> Any:
        """Return an engine on the CPU with all entry points."""
        checkpoint, names = checkpoint or self.checkpoint, tuple(self.served.program.entry_points)
        if name == "onnxruntime":
            return cpu_engine(self.served, self.spec, names, batch_sizes, checkpoint)
        if name == "torch":
            return torch_engine(self.served, self.spec, names, batch_sizes, CheckpointWeights(checkpoint))
        capacity = self.spec.serving.max_seq_len
        return ReferenceEngine(self.served.program, checkpoint, batch_sizes=batch_sizes, capacity=capacity)

    def module(self) -> Any:
        """Return the generated model with the checkpoint's weights."""
        package = load_package(emit(self.spec, "0" * 64))
        model = package.Model().eval()
        package.load_checkpoint(model, self.checkpoint.directory)
        return model


def small_model(folder: Path, extra: str = "") -> SmallModel:
    """Return the model with random weights, `extra` being more tables of its spec; all of its states are float32."""
    spec = spec_from_text(TEXT + extra)
    return SmallModel(spec, serve(spec), save_tensors(random_tensors(lower(spec)), folder / "weights"))


def generated(
    engine: Engine, spec: Spec, prompts: list[list[int]], count: int, drafter: Drafter | None
) -> list[list[int]]:
    """Return the greedy continuations of `prompts`."""
    generation = Generation(engine, prompts, Options(max_new_tokens=count), Capacity.of(spec), drafter=drafter)
    generation.run()
    return [sequence.new for sequence in generation.sequences]


def states_of(engine: Any) -> dict[str, Array]:
    """Return copies of an engine's states, by name."""
    return {name: torch.as_tensor(state).float().clone().numpy() for name, state in engine.states.items()}
