"""Opening the engine on a device: what computes there, in which type, and whether calls are recorded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from n3c.backends.progress import SILENT, Progress
from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError
from n3c.passes.serving import Served
from n3c.runtime.engines.cuda import no_memory, require_cuda
from n3c.specs.blocks import KINDS
from n3c.specs.schema import Spec

from .engine import TorchEngine
from .graphs import CudaRecorder
from .kernel_operations import kernel_operations
from .weights import WeightSource


def gap_of(spec: Spec) -> str | None:
    """Return what the engine lacks for a spec, in words; None where it can run it: block kinds of extensions."""
    foreign = next((kind for kind in spec.blocks if kind not in KINDS), None)
    return None if foreign is None else f"the engine `torch` has no {foreign.title} blocks (`{foreign.symbol}`)"


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
    N3CError: exit code 4 without a GPU or room on it and for block kinds of extensions, 6 where the weights do not
    fit.
    """
    gap = gap_of(spec)
    if gap is not None:
        help_ = "the engines onnxruntime, tensorrt and reference run what an extension adds"
        raise N3CError(Diagnostic("E0817", gap, spec.span("model.pattern"), help=help_), ExitCode.TARGET)
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
