"""Opening an engine by its name."""

from __future__ import annotations

from collections.abc import Sequence

from n3c.backends.progress import SILENT, Progress
from n3c.backends.safetensors.checkpoint import Checkpoint
from n3c.runtime.build_folder import OpenedBuild

from .choice import Device, EngineName
from .interface import Engine


def open_engine(
    engine: EngineName,
    build: OpenedBuild,
    names: Sequence[str],
    batch_sizes: Sequence[int],
    checkpoint: Checkpoint,
    device: Device,
    progress: Progress = SILENT,
) -> Engine:
    """Return an engine with the entry points `names` for calls of `batch_sizes` sequences.

    N3CError: exit code 4 where device, plans or memory are not there, 6 where the weights do not fit.
    """
    served, spec = build.served, build.spec
    if engine == "onnxruntime":
        from .onnxruntime.open import cpu_engine

        return cpu_engine(served, spec, names, batch_sizes, checkpoint, progress)
    if engine == "tensorrt":
        from .tensorrt.open import cuda_engine

        return cuda_engine(build, names, batch_sizes, checkpoint, progress)
    if engine == "torch":
        from .torch.open import torch_engine
        from .torch.weights import CheckpointWeights

        return torch_engine(served, spec, names, batch_sizes, CheckpointWeights(checkpoint), device, progress)
    from .reference.engine import ReferenceEngine

    return ReferenceEngine(served.program, checkpoint, batch_sizes=batch_sizes, capacity=spec.serving.max_seq_len)
