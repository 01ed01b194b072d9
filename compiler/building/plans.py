"""Emission of entry points as ONNX files, and of the plans that are built from those very files."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from n3c.backends.hashing import sha256_file
from n3c.backends.onnx.embedded import WeightsFile, embed
from n3c.backends.onnx.emit import OnnxEntry, emit_entry
from n3c.backends.onnx.entry_forms import fastest_for
from n3c.backends.onnx.forms import batches_of
from n3c.backends.onnx.stages import balanced, layer_bytes, stages
from n3c.backends.trt.audit import Audit, audit, audit_json
from n3c.backends.trt.build import PlanResult, build_plan
from n3c.backends.trt.constants import weights_as_inputs
from n3c.backends.trt.module import load_trt
from n3c.backends.trt.plan_file import Sidecar, write_sidecar
from n3c.backends.trt.targets import served_gpus
from n3c.backends.trt.timing import Prediction, predict, times_json
from n3c.backends.trt.traffic import Traffic, traffic, traffic_json
from n3c.ir.program import EntryPoint
from n3c.passes.serving import Served
from n3c.specs.schema import Spec

from .judged import Judged
from .request import Job

CONTEXT = 4096
"""Tokens of each sequence at which traffic and time are stated, where the cache holds as many."""


@dataclass(frozen=True, slots=True)
class Part:
    """An entry point, or a stage of it, at one batch size: it becomes one graph and one plan."""

    name: str
    """`decode.b4`."""
    stage: int | None
    batch: int
    entry_point: EntryPoint
    onnx: str
    """Name of the ONNX file, which leaves the first batch size of an entry point out."""

    @property
    def staged_name(self) -> str:
        """`decode.b4`, or `decode.b4.s1` for a stage."""
        return self.name if self.stage is None else f"{self.name}.s{self.stage}"


@dataclass(slots=True)
class _Made:
    """The rows of bindings.json and audit.json of the parts that are done."""

    job: Job
    bindings: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    weights: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    audits: dict[str, Audit] = field(default_factory=dict[str, Audit])
    traffic: dict[str, Traffic] = field(default_factory=dict[str, Traffic])
    times: dict[str, dict[str, Prediction]] = field(default_factory=dict[str, dict[str, Prediction]])
    """Plan → GPU → time."""
    entries: dict[str, str] = field(default_factory=dict[str, str])

    def graph(self, part: Part, entry: OnnxEntry) -> None:
        """Remember a graph: its inputs and outputs, and where its weights come from."""
        for binding in entry.weights:
            row = binding.as_json()
            known = self.weights.setdefault(binding.name, row)
            if known != row:
                raise AssertionError(f"weight {binding.name} has two layouts: {known} and {row}")
        self.bindings[part.staged_name] = {
            "onnx": f"onnx/{part.onnx}",
            "stage": part.stage,
            "inputs": entry.inputs,
            "outputs": entry.outputs,
            "dynamic": {name: list(lengths) for name, lengths in entry.dynamic_inputs.items()},
            "weights": [binding.name for binding in entry.weights],
        }

    def plan(self, part: Part, entry: OnnxEntry, result: PlanResult) -> None:
        """Judge a plan: the precisions that it realises, the bytes that it moves, the time that GPUs would take."""
        plan, program, request = result.path.name, self.job.served.program, self.job.request
        kernels = weights_as_inputs(result.kernels, entry.weights)
        self.audits[plan] = audit(entry.linears, kernels, entry.output_names, result.scratch_bytes)
        context = min(CONTEXT, self.job.spec.serving.max_seq_len)
        self.traffic[plan] = traffic(program, part.entry_point, entry, kernels, context=context)
        gpus = served_gpus(request.sms, request.trt)
        self.times[plan] = predict(program, part.entry_point, entry, kernels, self.traffic[plan], gpus)
        self.entries[plan] = part.name


def parts_of(served: Served, spec: Spec, *, entries: Sequence[str], count: int) -> Iterator[Part]:
    """Yield what there is to build: `entries`, or all, at each batch size, in `count` stages."""
    batches = spec.serving.batch_sizes
    starts = balanced(layer_bytes(served.program, len(spec.model.pattern), max(batches)), count)
    for name, entry_point in served.program.entry_points.items():
        if entries and name not in entries:
            continue
        cut = stages(served.program, entry_point, starts)
        sizes = batches_of(name, batches)
        for batch in sizes:
            for stage, part in cut:
                named = f"{name}.b{batch}"
                suffix = "" if count == 1 else f".s{stage}"
                onnx = f"{name if batch == sizes[0] else named}{suffix}.onnx"
                yield Part(named, stage if count > 1 else None, batch, part, onnx)


def emit_engines(job: Job) -> Judged:
    """Write OUT/onnx, and OUT/trt for the target trt; return what the audit says."""
    request, folder = job.request, job.folder
    trt = load_trt(request.trt) if request.target == "trt" else None  # where it is missing, say so before any work
    made = _Made(job)
    (folder / "onnx").mkdir()
    if trt is not None:
        (folder / "trt").mkdir()
    with _weights(job) as weights:
        for part in parts_of(job.served, job.spec, entries=request.entries, count=request.stages):
            entry = _emit(job, part, weights)
            made.graph(part, entry)
            if trt is not None:
                result = _build(job, part, entry, trt)
                made.plan(part, entry, result)
                _describe(job, part, result, trt.__version__)
    # Weights are the same for every batch size and mostly for every entry point, so they are listed once.
    bindings = {
        "schema": 1,
        "weights_mode": request.weights_mode,
        "weights": list(made.weights.values()),
        "entries": made.bindings,
    }
    _write_json(folder / ("onnx" if trt is None else "trt") / "bindings.json", bindings)
    if trt is None:
        return Judged()
    moved, times = traffic_json(made.traffic, made.entries), times_json(made.times, made.entries)
    _write_json(folder / "trt" / "audit.json", audit_json(made.audits) | {"traffic": moved, "time": times})
    mismatches = [diagnostic for verdict in made.audits.values() for diagnostic in verdict.diagnostics()]
    return Judged(mismatches, moved["entries"], times)


@contextlib.contextmanager
def _weights(job: Job) -> Generator[WeightsFile | None]:
    """Give the file of embedded weights, or None where they are bound."""
    if job.request.weights_mode == "bound" or job.request.weights is None:
        yield None
        return
    from n3c.backends.safetensors.checkpoint import Checkpoint

    with WeightsFile(job.folder / "onnx", Checkpoint(job.request.weights)) as file:
        yield file


def _emit(job: Job, part: Part, weights: WeightsFile | None) -> OnnxEntry:
    job.progress.phase(f"emit {part.staged_name}")
    choose = fastest_for(job.served.program, job.request.sms)
    entry = emit_entry(job.served.program, part.entry_point, batch=part.batch, choose=choose, progress=job.progress)
    if weights is not None:
        embed(entry, weights)
    entry.save(job.folder / "onnx" / part.onnx)
    return entry


def _build(job: Job, part: Part, entry: OnnxEntry, trt: Any) -> PlanResult:
    plan = f"{part.staged_name}.plan"
    job.progress.phase(f"build {plan}")
    return build_plan(
        job.folder / "onnx" / part.onnx,
        job.folder / "trt" / plan,
        trt,
        sms=job.request.sms,
        ranges=entry.dynamic_inputs,
        progress=job.progress,
        locate=entry.locate,
    )


def _describe(job: Job, part: Part, result: PlanResult, version: str) -> None:
    request = job.request
    sidecar = Sidecar(
        entry=part.name,
        stage=part.stage,
        flavour=request.trt,
        version=version,
        sms=request.sms,
        bytes=result.bytes,
        sha256=sha256_file(result.path),
        spec_sha256=job.spec_sha256,
        weights_mode=request.weights_mode,
    )
    write_sidecar(result.path, sidecar)


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8", newline="\n")
