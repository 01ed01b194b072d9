"""The engine of `--device cuda`: the plans of a build."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from n3c.backends.onnx.bindings import EntryBindings, read_bindings
from n3c.backends.progress import SILENT, Progress
from n3c.backends.safetensors.checkpoint import Checkpoint
from n3c.backends.trt.module import load_trt
from n3c.backends.trt.plan_file import check_plan, read_sidecar
from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError, Span
from n3c.runtime.build_folder import OpenedBuild

from .device import Device, cuda_devices
from .engine import Plan, TrtEngine


def cuda_engine(
    build: OpenedBuild,
    names: Sequence[str],
    batch_sizes: Sequence[int],
    checkpoint: Checkpoint,
    progress: Progress = SILENT,
    *,
    devices: Sequence[Device] | None = None,
    trt: Any = None,
) -> TrtEngine:
    """Return an engine of the plans of `build` for the entry points `names` and calls of `batch_sizes` sequences.

    `devices` are the GPUs that are visible, at most one a stage, and `trt` the TensorRT module that the plans were
    built by, unless given. N3CError: exit code 4 without GPU or plans, and where GPU or TensorRT are others than the
    plans', 6 where a file is altered.
    """
    plans = list(dict.fromkeys(plan for batch in batch_sizes for plan in _plans(build, names, batch)))
    devices = devices or cuda_devices(1 + max(plan.stage for plan in plans))
    flavour = read_sidecar(plans[0].path).flavour
    trt = trt or load_trt(flavour)
    for plan, sm in product(plans, sorted({device.sm for device in devices})):
        check_plan(
            plan.path, sm=sm, version=trt.__version__, flavour=flavour, spec_sha256=build.manifest["spec"]["sha256"]
        )
    program, states = build.served.program, build.served.plan
    return TrtEngine(
        trt, devices, plans, program.parameters, checkpoint, states, batch_sizes=batch_sizes, progress=progress
    )


def _plans(build: OpenedBuild, names: Sequence[str], batch: int) -> Iterator[Plan]:
    """Yield the plans of each entry point, its stages in order; those of `prefill` are for one sequence."""
    folder = build.out / "trt"
    if not build.has("trt/bindings.json"):
        raise _lacking(build.out, "this build has no plans")
    entries = read_bindings(folder / "bindings.json").entries
    for name in names:
        rows = [
            (key, row)
            for key, row in entries.items()
            if key.split(".")[:2] in ([name, f"b{batch}"], ["prefill", "b1"] if name == "prefill" else [])
        ]
        if not rows:
            raise _lacking(build.out, f"this build has no plan of `{name}` for {batch} sequences")
        sizes = {key.split(".")[1] for key, _ in rows}
        size = f"b{batch}" if f"b{batch}" in sizes else "b1"
        for key, row in rows:
            if key.split(".")[1] == size:
                yield _plan(folder, key, row, name, int(size[1:]))


def _plan(folder: Path, key: str, row: EntryBindings, entry: str, batch: int) -> Plan:
    return Plan(folder / f"{key}.plan", entry, batch, row.inputs, row.outputs, row.weights, row.stage or 0)


def _lacking(out: Path, message: str) -> N3CError:
    help_ = f"build them: `n3c build {out / 'spec.toml'} --target trt -o {out}`, or run with `--device cpu`"
    return N3CError(Diagnostic("E0813", message, Span(str(out)), help=help_), ExitCode.TARGET)
