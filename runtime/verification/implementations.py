"""Which forms of a model a build has, made ready to be compared."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx.external_data_helper import load_external_data_for_model

from n3c.backends.onnx.emit import emit_entry
from n3c.backends.safetensors.checkpoint import Checkpoint
from n3c.backends.safetensors.sources import load
from n3c.backends.torch.emit import emit
from n3c.backends.torch.loading import load_package
from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError
from n3c.runtime.build_folder import OpenedBuild
from n3c.runtime.engines.interface import Array
from n3c.runtime.engines.reference.engine import ReferenceEngine
from n3c.runtime.engines.tensorrt.open import cuda_engine
from n3c.specs.schema import Spec

from .evaluators import onnx_runtime, reference_evaluator
from .implementation import Leg, ReferenceLeg
from .onnx_graph import Graph, OnnxLeg, prepare
from .torch_module import TorchLeg
from .trt_plans import TrtLeg

EXACT = 1e-4
"""Float32 everywhere: only the order of sums differs."""
ROUNDED = {"fp32": EXACT, "fp16": 1e-2, "bf16": 3e-2, "fp8": 0.15}
"""By the narrowest state: a value near a tie is rounded the other way, and what is stored is read again."""
NARROW = 0.25
"""Where activations are quantized on the way into a GEMM: E2M1 alone is off by a tenth, and layers add up."""
MOST_ELEMENTS = 50_000_000
"""Parameters of a model that is verified whole; every form of it is in memory at once, in float32."""
EVALUATED_ELEMENTS = 10_000_000
"""Parameters up to which the files of a build are evaluated by the ONNX reference evaluator."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """A form that is not compared."""

    name: str
    reason: str


def require_small(build: OpenedBuild) -> int:
    """Return the number of parameters; N3CError (E0822, exit code 4) where they are too many to verify whole."""
    elements: int = build.manifest["parameters"]["total"] + build.manifest["parameters"]["mtp"]
    if elements > MOST_ELEMENTS:
        message = (
            f"the model has {elements:,} parameters; verifying holds every form of it in float32 at once, which is done"
            f" up to {MOST_ELEMENTS:,}"
        )
        help_ = "verify the same kinds of layers in small: `n3c build --set model.pattern=… --set moe.num_experts=…`"
        raise N3CError(Diagnostic("E0822", message, help=help_), ExitCode.TARGET)
    return elements


def reference(build: OpenedBuild, checkpoint: Checkpoint, batch: int) -> ReferenceLeg:
    """Return the reference."""
    program, capacity = build.served.program, build.spec.serving.max_seq_len
    return ReferenceLeg(program, ReferenceEngine(program, checkpoint, batch=batch, capacity=capacity))


@contextmanager
def forms(build: OpenedBuild, checkpoint: Checkpoint, batch: int) -> Generator[tuple[list[Leg], list[Skipped]]]:
    """Yield what can be compared on this machine, and what cannot."""
    spec, program = build.spec, build.served.program
    states = _tolerance(spec)
    skipped: list[Skipped] = []
    built = build.has("torch/train.py")
    generated = load_package(build.out / "torch" if built else emit(spec, build.manifest["spec"]["sha256"]))
    found: list[Leg] = [TorchLeg(generated, spec, checkpoint, states)]
    entries = [emit_entry(program, name, batch=batch, rendering="float32") for name in program.entry_points]
    graphs = {e.name: [prepare(onnx.load_from_string(e.to_bytes()), program, onnx_runtime)] for e in entries}
    weights = {p.name: load(p, checkpoint) for entry in entries for p in entry.parameters}
    found.append(OnnxLeg("ONNX Runtime, float32", program, graphs, weights, states, states))
    files = _files(build, batch)
    if not files:
        skipped.append(Skipped("ONNX files", "not in this build; `n3c build --target onnx` makes them"))
    elif require_small(build) > EVALUATED_ELEMENTS:
        skipped.append(Skipped("ONNX files", f"more than {EVALUATED_ELEMENTS:,} parameters"))
    else:
        found.append(_file_leg(build, checkpoint, files, states))
    plans = _plans(build, checkpoint, batch)
    found, skipped = ([*found, plans], skipped) if isinstance(plans, TrtLeg) else (found, [*skipped, plans])
    yield found, skipped


def _tolerance(spec: Spec) -> float:
    serving = spec.serving
    return max(ROUNDED[kind] for kind in (serving.kv_cache_dtype, serving.ssm_state_dtype, serving.conv_state_dtype))


def _files(build: OpenedBuild, batch: int) -> dict[str, list[Path]]:
    """Return the ONNX files of each entry point, its stages in order, for `batch` sequences or one."""
    for folder in ("trt", "onnx"):
        if build.has(f"{folder}/bindings.json"):
            entries: Mapping[str, Any] = json.loads((build.out / folder / "bindings.json").read_text())["entries"]
            break
    else:
        return {}
    chosen: dict[str, list[Path]] = {}
    for name, row in entries.items():
        entry, size = name.split(".")[:2]
        if size == f"b{batch}" or (entry == "prefill" and size == "b1"):
            chosen.setdefault(entry, []).append(build.out / row["onnx"])
    return chosen


def _file_leg(build: OpenedBuild, checkpoint: Checkpoint, files: Mapping[str, list[Path]], tolerance: float) -> OnnxLeg:
    program = build.served.program
    graphs: dict[str, list[Graph]] = {
        entry: [prepare(_read(path), program, reference_evaluator) for path in paths] for entry, paths in files.items()
    }
    weights: dict[str, Array] = {name: load(p, checkpoint) for name, p in program.parameters.items()}
    return OnnxLeg("ONNX files, reference evaluator", program, graphs, weights, tolerance, max(tolerance, NARROW))


def _read(path: Path) -> onnx.ModelProto:
    """Return a graph with the weights that lie beside its file, if it holds any."""
    model = onnx.load_from_string(path.read_bytes())
    load_external_data_for_model(model, str(path.parent))
    return model


def _plans(build: OpenedBuild, checkpoint: Checkpoint, batch: int) -> TrtLeg | Skipped:
    """Return the plans as a form, where the build has any and a GPU is there."""
    import torch

    if not torch.cuda.is_available():
        return Skipped("TensorRT", "no CUDA GPU is at hand")
    if not build.has("trt/bindings.json"):
        return Skipped("TensorRT", "no plans in this build; `n3c build --target trt` makes them")
    program = build.served.program
    engine = cuda_engine(build, list(program.entry_points), batch, checkpoint)
    return TrtLeg(program, engine, max(_tolerance(build.spec), ROUNDED["bf16"]), NARROW)
