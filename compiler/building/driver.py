"""The driver of `n3c build`: one spec in, one output directory out, in numbered phases.

1 load and check    2 passes    3 emit the target    4 manifest    5 rename into place
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from n3c.backends.progress import Progress
from n3c.backends.trt.targets import lacking
from n3c.compiler.report.cost import count_parameters, flops_per_token
from n3c.compiler.report.tool_versions import peak_rss_bytes, tool_versions
from n3c.ir.diagnostics import Diagnostic, Severity
from n3c.ir.program import Program
from n3c.passes.lower.model import lower
from n3c.passes.serving import Served, serve
from n3c.runtime.manifest import MANIFEST
from n3c.specs.dump import dump_spec
from n3c.specs.load import load_spec
from n3c.specs.schema import Spec

from . import outdir
from .checks import require_target
from .request import Request, require_request


@dataclass(slots=True)
class Build:
    """A finished build. `mismatches` are precisions that plans do not realise (exit code 5)."""

    out: Path
    files: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    seconds: float = 0.0
    warnings: list[Diagnostic] = field(default_factory=list[Diagnostic])
    mismatches: list[Diagnostic] = field(default_factory=list[Diagnostic])
    traffic: dict[str, Any] = field(default_factory=dict[str, Any])
    """Of each entry point at each batch size the bytes that it moves and must move, as in audit.json."""

    def as_json(self) -> dict[str, Any]:
        """Return the form of `n3c build --json`."""
        return {
            "ok": not self.mismatches,
            "out": str(self.out),
            "files": self.files,
            "seconds": round(self.seconds, 3),
            "peak_rss_bytes": peak_rss_bytes(),
            "traffic": self.traffic,
            "diagnostics": [d.as_json() for d in (*self.warnings, *self.mismatches)],
        }


def build(request: Request, progress: Progress, after: Callable[[str, Program], None] | None = None) -> Build:
    """Build `request`; `after` sees the program after lowering and after each pass.

    Raises N3CError: exit code 3 for the spec, 4 for the target, 6 for files; nothing is written then.
    """
    start = time.perf_counter()
    progress.phase("load")
    spec, warnings = load_spec(request.spec, request.overrides)
    out = request.out if request.out is not None else Path("build") / spec.name
    outdir.require_writable(out)

    progress.phase("passes")
    served = serve(spec, after, lacking=lacking(request.sms) if request.target == "trt" else ())
    if request.target != "torch":
        require_request(spec, served, request)
        require_target(spec, request.sms if request.target == "trt" else (), request.trt)
    if request.weights is not None:
        from n3c.backends.safetensors.checkpoint_fit import fitting_checkpoint

        fitting_checkpoint(spec, request.weights)

    resolved = dump_spec(spec)
    spec_sha256 = hashlib.sha256(resolved.encode()).hexdigest()
    built = Build(out, warnings=[*warnings, *served.warnings])
    with outdir.replacing(out, progress.phase) as folder:
        outdir.keep_other_targets(
            out, folder, spec_sha256, replaced={request.target} | ({"onnx"} if request.target == "trt" else set())
        )
        (folder / "spec.toml").write_text(resolved, encoding="utf-8")
        if request.target == "torch":
            built.warnings += _emit_torch(spec, spec_sha256, folder / "torch", progress)
        else:
            from .plans import emit_engines

            built.mismatches, built.traffic = emit_engines(request, spec, spec_sha256, served, folder, progress)
        progress.phase("manifest")
        manifest = _manifest(spec, spec_sha256, served, folder)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    built.files = manifest["files"]
    built.seconds = time.perf_counter() - start
    return built


def _emit_torch(spec: Spec, spec_sha256: str, folder: Path, progress: Progress) -> list[Diagnostic]:
    from n3c.backends.torch.emit import emit
    from n3c.backends.torch.loading import write_files
    from n3c.backends.torch.megatron import gaps

    program = lower(spec)
    flops, next_flops = (flops_per_token(program, context, mtp=True) for context in (0, 1))
    progress.phase("emit torch")
    folder.mkdir()
    write_files(emit(spec, spec_sha256, (flops, next_flops - flops)), folder)
    why = [f"no Megatron files: in Megatron-Bridge, {gap}" for gap in gaps(spec)]
    return [Diagnostic("W0519", text, severity=Severity.WARNING) for text in why]


def _manifest(spec: Spec, spec_sha256: str, served: Served, folder: Path) -> dict[str, Any]:
    return {
        "schema": 1,
        "spec": {"name": spec.name, "sha256": spec_sha256},
        "tools": tool_versions(),
        "passes": [{"name": r.name, "seconds": round(r.seconds, 6), "changed": r.changed} for r in served.reports],
        "parameters": count_parameters(lower(spec), spec).as_json(),
        "ledger": [
            {
                "name": entry.name,
                "role": entry.role,
                "shape": list(entry.shape),
                "rule": entry.rule,
                "format": entry.format,
                "bytes": entry.bytes,
            }
            for entry in served.program.ledger
        ],
        "state_plan": served.plan.as_json(),
        "files": outdir.described_files(folder),
    }
