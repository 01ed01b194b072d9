"""The engine half of the driver: entry points as ONNX, and plans built from those very files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from n3c.backends.onnx.emit import OnnxEntry, emit_entry
from n3c.backends.progress import Progress as Event
from n3c.backends.trt.module import load_trt
from n3c.ir.diagnostics import Diagnostic
from n3c.specs.schema import Spec

from .driver import Request
from .progress import Progress
from .serving import Served


def emit_engines(request: Request, spec: Spec, served: Served, folder: Path, progress: Progress) -> list[Diagnostic]:
    """Write OUT/onnx, and OUT/trt for the target trt; return the precisions that are not realised."""
    if request.target == "trt":
        load_trt(request.trt)  # where it is missing, say so before any work
    onnx = folder / "onnx"
    onnx.mkdir()
    entries: list[tuple[OnnxEntry, Path, str]] = []
    for batch in spec.serving.batch_sizes:
        progress.phase(f"emit decode, batch {batch}")
        entry = emit_entry(
            served.program, "decode", batch=batch, progress=lambda label, done, total: progress.step(label, done, total)
        )
        first = batch == spec.serving.batch_sizes[0]
        path = onnx / ("decode.onnx" if first else f"decode.b{batch}.onnx")
        entry.save(path)
        entries.append((entry, path, f"decode.b{batch}"))
    if request.target == "onnx":
        _write_json(onnx / "bindings.json", _bindings(entries))
        return []
    return _build_plans(request, entries, folder / "trt", progress)


def _build_plans(
    request: Request, entries: list[tuple[OnnxEntry, Path, str]], folder: Path, progress: Progress
) -> list[Diagnostic]:
    from n3c.backends.trt.audit import Audit, audit, audit_json
    from n3c.backends.trt.build import build_plan

    trt = load_trt(request.trt)
    folder.mkdir()
    audits: dict[str, Audit] = {}
    for entry, path, name in entries:
        progress.phase(f"build {name}.plan")

        def show(event: Event) -> None:
            progress.step(event.phase, event.step, event.total)

        result = build_plan(path, folder / f"{name}.plan", trt, sm=request.sm, progress=show, locate=entry.locate)
        audits[f"{name}.plan"] = audit(entry.linears, result.kernels, entry.output_names, result.scratch_bytes)
    _write_json(folder / "bindings.json", _bindings(entries))
    _write_json(folder / "audit.json", audit_json(audits))
    return [diagnostic for verdict in audits.values() for diagnostic in verdict.diagnostics()]


def _bindings(entries: list[tuple[OnnxEntry, Path, str]]) -> dict[str, Any]:
    """Weights are the same for every batch size, so they are listed once."""
    return {
        "schema": 1,
        "weights": entries[0][0].bindings,
        "entries": {
            name: {"onnx": f"onnx/{path.name}", "inputs": e.inputs, "outputs": e.outputs} for e, path, name in entries
        },
    }


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
