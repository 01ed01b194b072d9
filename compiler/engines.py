"""The engine half of the driver: entry points as ONNX, and plans built from those very files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from n3c.backends.onnx.emit import OnnxEntry, emit_entry
from n3c.backends.onnx.stages import stages
from n3c.backends.progress import Progress as Event
from n3c.backends.trt.module import load_trt
from n3c.ir.diagnostics import Diagnostic
from n3c.ir.program import EntryPoint
from n3c.specs.schema import Spec

from .driver import Request
from .progress import Progress
from .serving import Served


@dataclass(frozen=True, slots=True)
class Engine:
    """One entry point, or one stage of it, at one batch size: its graph and the name of its plan."""

    name: str
    """`decode.b4`, or `decode.b4.s1` for a stage."""
    path: Path
    """The ONNX file that the plan is built from."""
    entry: OnnxEntry


def emit_engines(request: Request, spec: Spec, served: Served, folder: Path, progress: Progress) -> list[Diagnostic]:
    """Write OUT/onnx, and OUT/trt for the target trt; return the precisions that are not realised."""
    if request.target == "trt":
        load_trt(request.trt)  # where it is missing, say so before any work
    onnx = folder / "onnx"
    onnx.mkdir()
    decode = served.program.entry_points["decode"]
    cut = stages(served.program, decode, -(-len(spec.model.pattern) // request.stages))
    engines = [
        _emit(served, part, i if len(cut) > 1 else None, batch, spec.serving.batch_sizes[0], onnx, progress)
        for batch in spec.serving.batch_sizes
        for i, part in enumerate(cut)
    ]
    if request.target == "onnx":
        _write_json(onnx / "bindings.json", _bindings(engines))
        return []
    return _build_plans(request, engines, folder / "trt", progress)


def _emit(
    served: Served, part: EntryPoint, stage: int | None, batch: int, first_batch: int, folder: Path, progress: Progress
) -> Engine:
    """Write one graph: `decode.onnx` is that of the first batch size, `decode.b4.s1.onnx` a stage of another."""
    suffix = "" if stage is None else f".s{stage}"
    name = f"decode.b{batch}{suffix}"
    progress.phase(f"emit {name}")
    entry = emit_entry(
        served.program, part, batch=batch, progress=lambda label, done, total: progress.step(label, done, total)
    )
    path = folder / (f"decode{suffix}.onnx" if batch == first_batch else f"{name}.onnx")
    entry.save(path)
    return Engine(name, path, entry)


def _build_plans(request: Request, engines: list[Engine], folder: Path, progress: Progress) -> list[Diagnostic]:
    from n3c.backends.trt.audit import Audit, audit, audit_json
    from n3c.backends.trt.build import build_plan

    def show(event: Event) -> None:
        progress.step(event.phase, event.step, event.total)

    trt = load_trt(request.trt)
    folder.mkdir()
    audits: dict[str, Audit] = {}
    for engine in engines:
        plan, entry = f"{engine.name}.plan", engine.entry
        progress.phase(f"build {plan}")
        result = build_plan(engine.path, folder / plan, trt, sm=request.sm, progress=show, locate=entry.locate)
        audits[plan] = audit(entry.linears, result.kernels, entry.output_names, result.scratch_bytes)
    _write_json(folder / "bindings.json", _bindings(engines))
    _write_json(folder / "audit.json", audit_json(audits))
    return [diagnostic for verdict in audits.values() for diagnostic in verdict.diagnostics()]


def _bindings(engines: list[Engine]) -> dict[str, Any]:
    """Weights are the same for every batch size, so they are listed once."""
    weights = {row["name"]: row for engine in engines for row in engine.entry.bindings}
    return {
        "schema": 1,
        "weights": list(weights.values()),
        "entries": {
            engine.name: {
                "onnx": f"onnx/{engine.path.name}",
                "inputs": engine.entry.inputs,
                "outputs": engine.entry.outputs,
                "weights": [row["name"] for row in engine.entry.bindings],
            }
            for engine in engines
        },
    }


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
