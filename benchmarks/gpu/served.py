"""The torch engine with random weights that are made on the device, for the parts that time it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from n3c.passes.serving import serve
from n3c.runtime.engines.torch.model import stored_parameters
from n3c.runtime.engines.torch.open import torch_engine
from n3c.runtime.engines.torch.weights import RandomWeights
from n3c.specs.schema import Spec

from .part import Setting


def engine_of(spec: Spec, setting: Setting, names: Sequence[str], batches: Sequence[int]) -> Any:
    """Return an engine of a spec for calls of `batches` sequences, its weights in the formats of the spec."""
    weights = RandomWeights(stored_parameters(spec))
    return torch_engine(serve(spec), spec, names, batches, weights, "cuda" if setting.device == "cuda" else "cpu")


def call_of(engine: Any, entry: str, context: int, seed: int = 0) -> Callable[[], object]:
    """Return what runs an entry point with `context` tokens in the states of each sequence."""
    random = np.random.default_rng(seed)
    inputs: dict[str, Any] = {}
    for name, port in engine.signatures[entry].inputs.items():
        shape = tuple(int(size) for size in port.shape)
        if name.endswith("ids"):
            inputs[name] = random.integers(0, 256, shape)
        elif name == "lengths":
            inputs[name] = np.full(shape, context)
        elif name == "accepted":
            inputs[name] = np.ones(shape, np.int64)
        elif name == "counts":
            inputs[name] = np.full(shape, engine.signatures[entry].inputs["input_ids"].shape[1])
        else:
            inputs[name] = random.standard_normal(shape).astype(np.float32)
    return lambda: engine.run(entry, inputs)


def free() -> None:
    """Return memory of what is no longer referenced to the device."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def replay_of(engine: Any, entry: str) -> Callable[[], object] | None:
    """Return the recorded graph of an entry point, without copies from and to the host; None where there is none."""
    replay: Callable[[], object] | None = engine.replay(entry)
    return replay
