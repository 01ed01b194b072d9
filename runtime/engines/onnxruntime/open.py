"""The engine of `--device cpu`: entry points emitted again from the spec, in float32, for ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence

from n3c.backends.onnx.emit import emit_entry
from n3c.backends.progress import SILENT, Progress
from n3c.backends.safetensors.checkpoint import Checkpoint
from n3c.passes.serving import Served
from n3c.specs.schema import Spec

from .engine import OnnxRuntimeEngine


def cpu_engine(
    served: Served,
    spec: Spec,
    names: Sequence[str],
    batch_sizes: Sequence[int],
    checkpoint: Checkpoint,
    progress: Progress = SILENT,
) -> OnnxRuntimeEngine:
    """Return an engine on the CPU with the entry points `names`."""
    return OnnxRuntimeEngine(
        [emit_entry(served.program, name, batch=batch, rendering="float32") for batch in batch_sizes for name in names],
        checkpoint,
        capacity=spec.serving.max_seq_len,
        in_place=[name for name, state in served.program.states.items() if state.kind == "kv"],
        progress=progress,
    )
