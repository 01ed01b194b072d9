"""Opening an engine by its name."""

from __future__ import annotations

from collections.abc import Sequence

from n3c.backends.progress import SILENT, Progress
from n3c.backends.safetensors.checkpoint import Checkpoint
from n3c.passes.serving import serve
from n3c.runtime.build_folder import OpenedBuild

from .activations import require_scales, with_scales_of
from .choice import Device, EngineName
from .interface import Engine
from .memory import memory_told


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

    With a checkpoint that was not calibrated an engine is weight-only, but plans, which are what they were built for.
    N3CError: exit code 4 where device, plans or memory are not there, 6 where the weights do not fit, or have no
    activation scales for plans that want them.
    """
    with memory_told("weights and states"):
        return _opened(engine, build, names, batch_sizes, checkpoint, device, progress)


def _opened(
    engine: EngineName,
    build: OpenedBuild,
    names: Sequence[str],
    batch_sizes: Sequence[int],
    checkpoint: Checkpoint,
    device: Device,
    progress: Progress,
) -> Engine:
    spec = with_scales_of(build.spec, build.served.program, checkpoint)
    served = build.served if spec is build.spec else serve(spec)
    if engine == "onnxruntime":
        from .onnxruntime.open import cpu_engine

        return cpu_engine(served, spec, names, batch_sizes, checkpoint, progress)
    if engine == "tensorrt":
        from .tensorrt.open import cuda_engine

        require_scales(build.spec, build.served.program, checkpoint)
        return cuda_engine(build, names, batch_sizes, checkpoint, progress)
    if engine == "torch":
        from .torch.open import torch_engine
        from .torch.weights import CheckpointWeights

        return torch_engine(served, spec, names, batch_sizes, CheckpointWeights(checkpoint), device, progress)
    from .reference.engine import ReferenceEngine

    return ReferenceEngine(served.program, checkpoint, batch_sizes=batch_sizes, capacity=spec.serving.max_seq_len)
