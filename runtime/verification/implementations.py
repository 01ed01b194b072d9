"""The implementations of a model that a build has, ready to be compared."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import onnx
from onnx.external_data_helper import load_external_data_for_model

from n3c.backends.onnx.bindings import read_bindings
from n3c.backends.onnx.emit import emit_entry
from n3c.backends.onnx.entry_forms import fastest_for
from n3c.backends.safetensors.checkpoint import Checkpoint
from n3c.backends.safetensors.sources import load
from n3c.backends.torch.emit import emit
from n3c.backends.torch.loading import load_package
from n3c.runtime.build_folder import OpenedBuild
from n3c.runtime.engines.interface import Array
from n3c.runtime.engines.reference.engine_products import EngineProducts
from n3c.runtime.engines.tensorrt.open import cuda_engine
from n3c.runtime.engines.torch.open import gap_of, torch_engine
from n3c.runtime.engines.torch.weights import CheckpointWeights

from .engine_outputs import EngineOutputs
from .evaluators import onnx_runtime, reference_evaluator
from .implementation import Implementation
from .model_size import MOST_EVALUATED, parameters
from .onnx_graph import layerwise, whole
from .onnx_graphs import OnnxGraphs
from .reference import weight_only
from .tolerance import AsDeployed, end_to_end, float32
from .torch_module import TorchModule


@dataclass(frozen=True, slots=True)
class Skipped:
    """An implementation that is not compared."""

    name: str
    reason: str


def implementations(
    build: OpenedBuild, checkpoint: Checkpoint, batch: int
) -> tuple[list[Implementation], list[Skipped]]:
    """Return what can be compared on this machine, and what cannot."""
    made = (
        _torch_module(build, checkpoint),
        _torch_engine(build, checkpoint, batch),
        _float32_graphs(build, checkpoint, batch),
        _onnx_files(build, checkpoint, batch),
        _tensorrt_plans(build, checkpoint, batch),
    )
    return [m for m in made if not isinstance(m, Skipped)], [m for m in made if isinstance(m, Skipped)]


def _torch_module(build: OpenedBuild, checkpoint: Checkpoint) -> TorchModule:
    """Return the module of the build's package, or of one emitted for its spec if the build has none."""
    built = build.has("torch/train.py")
    package = load_package(build.out / "torch" if built else emit(build.spec, build.manifest["spec"]["sha256"]))
    return TorchModule(package, build.spec, checkpoint)


def _torch_engine(build: OpenedBuild, checkpoint: Checkpoint, batch: int) -> EngineOutputs | Skipped:
    """Return the engine that `n3c run --engine torch` runs on a CPU: packed weights, float32 activations."""
    gap = gap_of(build.spec)
    if gap is not None:
        return Skipped("PyTorch engine, packed", gap)
    served, weights = weight_only(build), CheckpointWeights(checkpoint)
    program = served.program
    spec = replace(build.spec, serving=replace(build.spec.serving, activations="weight_only"))
    engine = torch_engine(served, spec, list(program.entry_points), [batch], weights)

    def states() -> dict[str, Array]:
        return {name: state.clone().numpy() for name, state in engine.states.items()}

    return EngineOutputs("PyTorch engine, packed", "none", program, engine, float32, states)


def _float32_graphs(build: OpenedBuild, checkpoint: Checkpoint, batch: int) -> OnnxGraphs:
    """Return the float32 rendering that `n3c run --device cpu` executes."""
    program = weight_only(build).program
    entries = [emit_entry(program, name, batch=batch, rendering="float32") for name in program.entry_points]
    graphs = {e.name: [whole(onnx.load_from_string(e.to_bytes()), program, onnx_runtime)] for e in entries}
    weights = {p.name: load(p, checkpoint) for entry in entries for p in entry.parameters}
    return OnnxGraphs("ONNX Runtime, float32", program, graphs, weights, "none", float32)


def _onnx_files(build: OpenedBuild, checkpoint: Checkpoint, batch: int) -> OnnxGraphs | Skipped:
    """Return the ONNX files of the build, which plans are built from."""
    files = _files(build, batch)
    if not files:
        return Skipped("ONNX files", "not in this build; `n3c build --target onnx` makes them")
    if parameters(build) > MOST_EVALUATED:
        return Skipped("ONNX files", f"more than {MOST_EVALUATED:,} parameters")
    program = build.served.program
    graphs = {
        entry: [layerwise(_read(path), program, reference_evaluator) for path in paths]
        for entry, paths in files.items()
    }
    weights = {name: load(p, checkpoint) for name, p in program.parameters.items()}
    tolerance = AsDeployed(
        program, EngineProducts(program, batch, fastest_for(program, build.sms)), build.spec.model.hidden_size
    )
    return OnnxGraphs("ONNX files, reference evaluator", program, graphs, weights, "as deployed", tolerance)


def _files(build: OpenedBuild, batch: int) -> dict[str, list[Path]]:
    """Return the ONNX files of each entry point, its stages in order, for `batch` sequences or one."""
    for folder in ("trt", "onnx"):
        if build.has(f"{folder}/bindings.json"):
            entries = read_bindings(build.out / folder / "bindings.json").entries
            break
    else:
        return {}
    chosen: dict[str, list[Path]] = {}
    for name, row in entries.items():
        entry, size = name.split(".")[:2]
        if size == f"b{batch}" or (entry == "prefill" and size == "b1"):
            chosen.setdefault(entry, []).append(build.out / row.onnx)
    return chosen


def _read(path: Path) -> onnx.ModelProto:
    """Return a graph with the weights that lie beside its file, if it holds any."""
    model = onnx.load_from_string(path.read_bytes())
    load_external_data_for_model(model, str(path.parent))
    return model


def _tensorrt_plans(build: OpenedBuild, checkpoint: Checkpoint, batch: int) -> EngineOutputs | Skipped:
    """Return the plans of the build, which need a GPU."""
    import torch

    if not torch.cuda.is_available():
        return Skipped("TensorRT", "no CUDA GPU is at hand")
    if not build.has("trt/bindings.json"):
        return Skipped("TensorRT", "no plans in this build; `n3c build --target trt` makes them")
    program = build.served.program
    engine = cuda_engine(build, list(program.entry_points), [batch], checkpoint)
    tolerance = end_to_end(program, EngineProducts(program, batch, fastest_for(program, build.sms)))
    return EngineOutputs("TensorRT plans", "as deployed", program, engine, tolerance)
