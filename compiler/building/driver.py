"""The driver of a build: one spec in, one output directory out, in numbered phases.

1 load and check    2 passes    3 emit the target    4 manifest    5 rename into place
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from n3c.backends.added import OWN, added_backends
from n3c.backends.machine import peak_rss_bytes
from n3c.backends.progress import SILENT, Progress
from n3c.backends.trt.plan_cache import CACHE_BYTES
from n3c.backends.trt.targets import Flavour, lacking, sm_versions, unpublished
from n3c.compiler.common_options import FOR_PLANS, SET, SM, SPEC, TRT, Target
from n3c.compiler.report.cost import Parameters, count_parameters, flops_per_token
from n3c.compiler.report.tool_versions import tool_versions
from n3c.ir.diagnostics import Diagnostic, Severity
from n3c.ir.program import Program
from n3c.passes.lower.model import lower
from n3c.passes.serving import serve
from n3c.runtime.manifest import MANIFEST
from n3c.runtime.options import Needs, Option, checked, size_of
from n3c.specs.dump import dump_spec
from n3c.specs.load import loaded
from n3c.specs.schema import Spec

from . import outdir
from .checks import require_target
from .judged import Judged
from .recorded import BUILDS, record
from .request import Entry, Job, Request, WeightsMode, require_request

REPRODUCIBLE = "SOURCE_DATE_EPOCH"
"""Set by whoever wants the same bytes from the same input (reproducible-builds.org): no time is written then."""
FOR_GRAPHS = Needs("target", ("onnx", "trt"))
CACHED = Needs("no_cache", (False,), said="a cache: leave --no-cache out")


@dataclass(frozen=True, slots=True)
class Built:
    """A finished build."""

    out: Path
    files: Sequence[dict[str, Any]]
    """Path, bytes and sha256 of each."""
    warnings: Sequence[Diagnostic]
    mismatches: Sequence[Diagnostic]
    """Precisions that plans do not realise (exit code 5)."""
    traffic: dict[str, Any]
    """Of each entry point at each batch size the bytes that it moves and must move, as in audit.json."""
    time: dict[str, Any]
    """The predicted time of each on each GPU that it is for, as in audit.json."""
    plans: dict[str, int]
    """How many plans were `built`, `cached` (taken from the cache) or are the `same` as another one of the build."""
    seconds: float
    peak_rss_bytes: int | None
    """The most memory that a process of the build has held."""

    def as_json(self) -> dict[str, Any]:
        """Return the form of `n3c build --json`."""
        return {
            "ok": not self.mismatches,
            "out": str(self.out),
            "files": list(self.files),
            "plans": self.plans,
            "seconds": round(self.seconds, 3),
            "peak_rss_bytes": self.peak_rss_bytes,
            "traffic": self.traffic,
            "time": self.time,
            "diagnostics": [d.as_json() for d in (*self.warnings, *self.mismatches)],
        }


@checked
def build(
    spec: Annotated[Path | str | Spec, SPEC],
    *,
    target: Annotated[Target, Option("What to build.", added=added_backends)],
    output: Annotated[Path | str | None, Option("Output directory (default: build/<name>).", "-o", "DIR")] = None,
    weights: Annotated[
        Path | str | None, Option("Checkpoint directory or hub id; must fit the spec.", metavar="DIR")
    ] = None,
    trt: Annotated[Flavour, TRT] = "rtx",
    sm: Annotated[int | str | Sequence[int], SM] = 120,
    weights_mode: Annotated[
        WeightsMode,
        Option(
            "Bound: weights are inputs of the engine. Embedded: constants in graph and plan; needs --weights.",
            needs=FOR_GRAPHS,
        ),
    ] = "bound",
    entry: Annotated[
        Sequence[Entry], Option("Build this entry point only; may repeat. Default: all.", needs=FOR_GRAPHS)
    ] = (),
    stages: Annotated[
        int,
        Option("Cut each entry point into this many plans, at layer boundaries.", least=1, most=64, needs=FOR_GRAPHS),
    ] = 1,
    jobs: Annotated[
        int | None,
        Option(
            "Build so many plans at once (default: as cores and free memory allow).",
            "-j",
            least=1,
            most=1024,
            needs=FOR_PLANS,
        ),
    ] = None,
    no_cache: Annotated[
        bool, Option("Build every plan: take none from the user's cache, and keep none there.", needs=FOR_PLANS)
    ] = False,
    cache_size: Annotated[
        int | str | None,
        Option("How large the cache of plans may become (default: 4GB).", metavar="SIZE", needs=CACHED),
    ] = None,
    set: Annotated[Sequence[str], SET] = (),
    after: Callable[[str, Program], None] | None = None,
    progress: Progress = SILENT,
) -> Built:
    """Compile a spec to PyTorch code, ONNX graphs or TensorRT plans.

    `after` sees the program after lowering and after each pass. Raises N3CError: exit code 2 for options that do not
    fit, 3 for the spec, 4 for the target, 6 for files; nothing is written then.
    """
    start = time.perf_counter()
    progress.phase("load")
    read, warnings = loaded(spec, set)
    out = Path(output) if output is not None else Path("build") / read.name
    outdir.require_writable(out)
    sms = sm_versions(sm) if target == "trt" else ()
    cache_bytes = 0 if no_cache else CACHE_BYTES if cache_size is None else size_of("--cache-size", cache_size)
    checkpoint = None
    if weights is not None:
        from n3c.backends.safetensors.locate import checkpoint_directory, require_outside

        checkpoint = checkpoint_directory(weights)
        require_outside(out, [checkpoint])
    request = Request(target, checkpoint, trt, sms, stages, entry, weights_mode)

    progress.phase("passes")
    program = lower(read)
    counts = count_parameters(program, read)
    flops = tuple(flops_per_token(program, context, mtp=True) for context in (0, 1))
    served = serve(read, after, lacking=lacking(sms), lowered=program)
    if target in ("onnx", "trt"):
        require_request(read, served, request)
        require_target(read, sms, trt)
    if checkpoint is not None:
        from n3c.backends.safetensors.checkpoint_fit import fitting_checkpoint

        fitting_checkpoint(read, checkpoint)

    resolved = dump_spec(read)
    spec_sha256 = hashlib.sha256(resolved.encode()).hexdigest()
    warnings = [*warnings, *served.warnings, *unpublished(sms, trt)]
    judged = Judged()
    with outdir.replacing(out, progress.phase) as folder:
        replaced = ("trt", "onnx") if target == "trt" else (target,)
        builds = outdir.keep_other_targets(out, folder, spec_sha256, replaced) | {target: record(request)}
        (folder / "spec.toml").write_text(resolved, encoding="utf-8", newline="\n")
        job = Job(request, read, spec_sha256, served, folder, progress, jobs, cache_bytes)
        if target == "torch":
            warnings += _emit_torch(job, flops[0], flops[1] - flops[0])
        elif target not in OWN:
            from n3c.backends.torch.loading import write_files

            progress.phase(f"emit {target}")
            write_files(added_backends()[target].emit(read, served), folder / target)
        else:
            from .plans import emit_engines

            judged = emit_engines(job)
            warnings += judged.notes
        progress.phase("manifest")
        manifest = _manifest(job, counts, builds)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8", newline="\n")
    seconds = time.perf_counter() - start
    found = (judged.mismatches, judged.traffic, judged.time, judged.plans)
    peak = max((peak for peak in (peak_rss_bytes(), judged.builders_peak) if peak), default=None)
    return Built(out, manifest["files"], warnings, *found, seconds, peak)


def _emit_torch(job: Job, flops: int, flops_of_context: int) -> list[Diagnostic]:
    """Write OUT/torch. A token takes `flops` and `flops_of_context` for each token that it attends to."""
    from n3c.backends.torch.emit import emit
    from n3c.backends.torch.loading import write_files
    from n3c.backends.torch.megatron import gaps

    job.progress.phase("emit torch")
    folder = job.folder / "torch"
    folder.mkdir()
    write_files(emit(job.spec, job.spec_sha256, (flops, flops_of_context)), folder)
    why = [f"no Megatron files: in Megatron-Bridge, {gap}" for gap in gaps(job.spec)]
    return [Diagnostic("W0519", text, severity=Severity.WARNING) for text in why]


def _manifest(job: Job, counts: Parameters, builds: dict[str, Any]) -> dict[str, Any]:
    served, reproducible = job.served, REPRODUCIBLE in os.environ
    return {
        "schema": 1,
        "spec": {"name": job.spec.name, "sha256": job.spec_sha256},
        "tools": tool_versions(),
        BUILDS: builds,
        "passes": [
            {"name": r.name, "seconds": None if reproducible else round(r.seconds, 6), "changed": r.changed}
            for r in served.reports
        ],
        "parameters": counts.as_json(),
        "ledger": [entry.as_json() for entry in served.program.ledger],
        "state_plan": served.plan.as_json(),
        "files": outdir.described_files(job.folder),
    }
