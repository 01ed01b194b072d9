"""Emission of entry points as ONNX files, and of the plans that are built from those very files."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from n3c.backends.hashing import sha256_file
from n3c.backends.onnx.bindings import FILE
from n3c.backends.onnx.embedded import WeightsFile, embed
from n3c.backends.onnx.emit import OnnxEntry, emit_entry
from n3c.backends.onnx.entry_forms import fastest_for
from n3c.backends.onnx.forms import batches_of
from n3c.backends.onnx.stages import balanced, layer_bytes, stages
from n3c.backends.trt.audit import Audit, audit, audit_json
from n3c.backends.trt.build import PlanResult
from n3c.backends.trt.builder_memory import builder_bytes
from n3c.backends.trt.builder_process import Order
from n3c.backends.trt.builders import Builders
from n3c.backends.trt.constants import weights_as_inputs
from n3c.backends.trt.module import load_trt
from n3c.backends.trt.plan_cache import plan_key
from n3c.backends.trt.plan_file import Sidecar, write_sidecar
from n3c.backends.trt.targets import served_gpus
from n3c.backends.trt.timing import Prediction, predict, times_json
from n3c.backends.trt.traffic import Traffic, traffic, traffic_json
from n3c.ir.program import EntryPoint
from n3c.passes.serving import Served
from n3c.specs.schema import Spec

from .judged import Judged
from .plan_source import PlanSource
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


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the kernels of a plan say of it."""

    audit: Audit
    traffic: Traffic
    times: Mapping[str, Prediction]
    """GPU → time."""


class _Bindings:
    """The rows of bindings.json: what graphs read and return, and where their weights come from."""

    def __init__(self) -> None:
        self.weights: dict[str, dict[str, Any]] = {}
        self.entries: dict[str, dict[str, Any]] = {}

    def add(self, part: Part, entry: OnnxEntry) -> None:
        """Add a graph."""
        for binding in entry.weights:
            row = binding.as_json()
            known = self.weights.setdefault(binding.name, row)
            if known != row:
                raise AssertionError(f"weight {binding.name} has two layouts: {known} and {row}")
        self.entries[part.staged_name] = {
            "onnx": f"onnx/{part.onnx}",
            "stage": part.stage,
            "inputs": entry.inputs,
            "outputs": entry.outputs,
            "dynamic": {name: list(lengths) for name, lengths in entry.dynamic_inputs.items()},
            "weights": [binding.name for binding in entry.weights],
        }

    def as_json(self, weights_mode: str) -> dict[str, Any]:
        """Return the file: weights, the same for every batch size and mostly for every entry point, stand once."""
        weights = list(self.weights.values())
        return {"schema": 1, "weights_mode": weights_mode, "weights": weights, "entries": self.entries}


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
    (job.folder / "onnx").mkdir()
    parts = list(parts_of(job.served, job.spec, entries=job.request.entries, count=job.request.stages))
    bindings = _Bindings()
    if job.request.target == "onnx":
        for part, entry in _emitted(job, parts):
            bindings.add(part, entry)
        _write_json(job.folder / "onnx" / FILE, bindings.as_json(job.request.weights_mode))
        return Judged()
    version = load_trt(job.request.trt).__version__  # where it is missing, say so before any work
    (job.folder / "trt").mkdir()
    judgements: dict[str, Judgement] = {}
    with Builders(job.builders) as builders:
        source = PlanSource(builders, job.cache_bytes)
        wanted: dict[Path, tuple[Part, OnnxEntry]] = {}
        by_time = sorted(parts, key=lambda part: -part.batch)  # those that take longest are not left for the end
        for part, entry in _emitted(job, by_time):
            order = _order(job, part, entry)
            wanted[order.plan] = (part, entry)
            source.want(order, _key(order, entry, version) if job.request.weights_mode == "bound" else None)
        for part, entry in sorted(wanted.values(), key=lambda of: parts.index(of[0])):
            bindings.add(part, entry)
        for plan in source.plans(job.progress):
            part, entry = wanted.pop(plan.path)
            judgements[part.staged_name] = _judged(job, part, entry, plan)
            _describe(job, part, plan, version)
    _write_json(job.folder / "trt" / FILE, bindings.as_json(job.request.weights_mode))
    return _audited(job, parts, judgements, source)


def _emitted(job: Job, parts: Sequence[Part]) -> Iterator[tuple[Part, OnnxEntry]]:
    """Write the graph of each part, and yield it."""
    choose = fastest_for(job.served.program, job.request.sms)
    with _weights(job) as weights:
        for part in parts:
            job.progress.phase(f"emit {part.staged_name}")
            entry = emit_entry(
                job.served.program, part.entry_point, batch=part.batch, choose=choose, progress=job.progress
            )
            if weights is not None:
                embed(entry, weights)
            entry.save(job.folder / "onnx" / part.onnx)
            yield part, entry


def _order(job: Job, part: Part, entry: OnnxEntry) -> Order:
    request, folder = job.request, job.folder
    model, plan = folder / "onnx" / part.onnx, folder / "trt" / f"{part.staged_name}.plan"
    memory = builder_bytes(entry, embedded=request.weights_mode == "embedded")
    return Order(model, plan, request.trt, request.sms, entry.dynamic_inputs, entry.spans, memory)


def _key(order: Order, entry: OnnxEntry, version: str) -> str:
    return plan_key(entry.to_nameless_bytes(), order.flavour, version, order.sms, order.ranges)


def _judged(job: Job, part: Part, entry: OnnxEntry, plan: PlanResult) -> Judgement:
    """Judge a plan: the precisions that it realises, the bytes that it moves, the time that GPUs would take."""
    program, request = job.served.program, job.request
    kernels = weights_as_inputs(plan.kernels, entry.weights)
    context = min(CONTEXT, job.spec.serving.max_seq_len)
    moved = traffic(program, part.entry_point, entry, kernels, context=context)
    gpus = served_gpus(request.sms, request.trt)
    return Judgement(
        audit(entry.linears, kernels, entry.output_names, plan.scratch_bytes),
        moved,
        predict(program, part.entry_point, entry, kernels, moved, gpus),
    )


def _audited(job: Job, parts: Sequence[Part], judgements: Mapping[str, Judgement], source: PlanSource) -> Judged:
    """Write audit.json, in the order of `parts` whichever plan was first, and return what it says."""
    entries = {f"{part.staged_name}.plan": part.name for part in parts}
    found = {f"{part.staged_name}.plan": judgements[part.staged_name] for part in parts}
    audits = {plan: judgement.audit for plan, judgement in found.items()}
    moved = traffic_json({plan: judgement.traffic for plan, judgement in found.items()}, entries)
    times = times_json({plan: judgement.times for plan, judgement in found.items()}, entries)
    _write_json(job.folder / "trt" / "audit.json", audit_json(audits) | {"traffic": moved, "time": times})
    mismatches = [diagnostic for verdict in audits.values() for diagnostic in verdict.diagnostics()]
    return Judged(mismatches, moved["entries"], times, source.counts.as_json(), source.peak, source.notes)


@contextlib.contextmanager
def _weights(job: Job) -> Generator[WeightsFile | None]:
    """Give the file of embedded weights, or None where they are bound."""
    if job.request.weights_mode == "bound" or job.request.weights is None:
        yield None
        return
    from n3c.backends.safetensors.checkpoint import Checkpoint

    with WeightsFile(job.folder / "onnx", Checkpoint(job.request.weights)) as file:
        yield file


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
