"""Opening the engine on a device: what computes there, in which type, and whether calls are recorded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from n3c.backends.progress import SILENT, Progress
from n3c.passes.serving import Served
from n3c.runtime.engines.cuda import no_memory, require_cuda
from n3c.specs.schema import Spec

from .engine import TorchEngine
from .graphs import CudaRecorder
from .kernel_operations import kernel_operations
from .weights import WeightSource


def torch_engine(
    served: Served,
    spec: Spec,
    names: Sequence[str],
    batch_sizes: Sequence[int],
    weights: WeightSource,
    device: Literal["cpu", "cuda"] = "cpu",
    progress: Progress = SILENT,
    *,
    dtype: torch.dtype | None = None,
) -> TorchEngine:
    """Return an engine with the entry points `names` for calls of `batch_sizes` sequences.

    Activations are of type `dtype`; without it float32 on a CPU and where all states of the spec are float32, else
    BF16. On a GPU Triton's kernels compute where Triton is installed, and calls that come again are CUDA graphs.
    N3CError: exit code 4 without a GPU or room on it, 6 where the weights do not fit.
    """
    if device == "cpu":
        place = torch.device("cpu")
        return TorchEngine(
            served, spec, names, batch_sizes, weights, device=place, dtype=dtype or torch.float32, progress=progress
        )
    require_cuda()
    place = torch.device("cuda", torch.cuda.current_device())
    wide = all(state.dtype == "f32" for state in served.plan.states)
    try:
        return TorchEngine(
            served,
            spec,
            names,
            batch_sizes,
            weights,
            device=place,
            dtype=dtype or (torch.float32 if wide else torch.bfloat16),
            operations=kernel_operations(),
            recorder=CudaRecorder(place),
            progress=progress,
        )
    except torch.OutOfMemoryError as error:
        raise no_memory(place.index, "the weights and states") from error
