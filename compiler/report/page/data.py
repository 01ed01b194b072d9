"""What the page of a spec, a checkpoint or a build shows, beyond the figures that `inspect --json` has."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from n3c.backends.progress import Progress
from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError, Span
from n3c.ir.json_file import parse_json, read_bounded
from n3c.ir.program import Program
from n3c.passes.pipelines import STAGES
from n3c.passes.serving import serve
from n3c.specs.modules import groups_of
from n3c.specs.schema import Spec

from ..build_difference import read_audit
from ..ir_difference import FunctionDifference, compare_functions, function_texts
from ..subject import Subject

if TYPE_CHECKING:
    from n3c.backends.safetensors.checkpoint import Checkpoint

METRICS = "metrics.jsonl"
LONGEST_METRICS = 1 << 28
"""Bytes of those of a run: half a million steps."""
CURVES = ("loss", "val_loss", "grad_norm", "lr", "tokens_per_second", "expert_load")
"""Metrics of a training run that are drawn, each in a chart; of several values a step, the largest."""


@dataclass(frozen=True, slots=True)
class PassView:
    """A pass of the serving pipeline, and what it did to the functions of the program."""

    name: str
    seconds: float
    changed: bool
    functions: tuple[FunctionDifference, ...]


@dataclass(frozen=True, slots=True)
class RoleError:
    """The error of quantization in the weights of one role and layer: Σ (q − w)² / Σ w²."""

    role: str
    layer: int | None
    format: str
    weights: int
    relative_error: float

    @property
    def sqnr(self) -> float:
        """Return the ratio of signal to noise in dB."""
        return -10 * math.log10(self.relative_error)


@dataclass(frozen=True, slots=True)
class Page:
    """The content of a page."""

    subject: Subject
    figures: Mapping[str, Any]
    """As `inspect_spec` gives them, with `checkpoint` where weights are there."""
    passes: tuple[PassView, ...]
    audit: Mapping[str, Any] | None
    """`audit.json` of a build with plans."""
    errors: tuple[RoleError, ...]
    curves: Mapping[str, Sequence[tuple[float, float]]]
    """Metric → (step, value)."""


def page_of(
    subject: Subject, figures: Mapping[str, Any], progress: Progress, original: Checkpoint | None, run: Path | None
) -> Page:
    """Gather what a page shows; `original` is what a checkpoint was quantized from, `run` the folder of a training."""
    audit = read_audit(subject.place) if subject.kind == "build" and subject.place else None
    errors: tuple[RoleError, ...] = ()
    if original is not None and subject.checkpoint is not None:
        errors = tuple(_errors(subject.spec, original, subject.checkpoint, progress))
    curves = read_metrics(run) if run is not None else {}
    return Page(subject, figures, passes_of(subject.spec), audit, errors, curves)


def passes_of(spec: Spec) -> tuple[PassView, ...]:
    """Return what each pass of serving changes, against the program in front of it."""
    texts: dict[str, dict[str, list[str]]] = {}

    def after(name: str, program: Program) -> None:
        if name in STAGES:
            texts[name] = function_texts(program)

    reports = serve(spec, after).reports
    stages = pairwise(STAGES)
    return tuple(
        PassView(report.name, report.seconds, report.changed, compare_functions(texts[before], texts[name]))
        for report, (before, name) in zip(reports, stages, strict=True)
    )


def _errors(spec: Spec, original: Checkpoint, quantized: Checkpoint, progress: Progress) -> Iterator[RoleError]:
    """Yield the errors of the weights that are quantized, by role and layer."""
    from ..tensor_difference import compare_tensors

    place = {f"{name}.weight": (group.role, group.layer) for group in groups_of(spec) for name in group.modules}
    sums: dict[tuple[str, int | None, str], list[float]] = {}
    for weight in compare_tensors(original, quantized, progress, headers_only=False).changed:
        if weight.values is None or weight.name not in place:
            continue
        signal = weight.values.rms_a**2 * math.prod(weight.shape_a)
        found = sums.setdefault((*place[weight.name], weight.format_b), [0, 0.0, 0.0])
        for i, more in enumerate((1, weight.values.relative_error * signal, signal)):
            found[i] += more
    for (role, layer, format_), (count, noise, signal) in sums.items():
        if noise and signal:
            yield RoleError(role, layer, format_, int(count), noise / signal)


def read_metrics(run: Path) -> dict[str, list[tuple[float, float]]]:
    """Return the curves of a training run; N3CError (E0601 or E0625, exit code 6) where its metrics cannot be read."""
    path = run / METRICS if run.is_dir() else run
    curves: dict[str, list[tuple[float, float]]] = {}
    try:
        for line in filter(None, map(bytes.strip, read_bounded(path, LONGEST_METRICS).splitlines())):
            row: Any = parse_json(line)
            for name in CURVES:
                value = row.get(name)
                if value not in (None, []):
                    curves.setdefault(name, []).append((float(row["step"]), _largest(value)))
    except OSError as error:
        raise _unreadable("E0601", error.strerror or str(error), path) from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise _unreadable("E0625", "no metrics of a training run: a JSON object with `step` a line", path) from error
    return curves


def _largest(value: Any) -> float:
    return float(max(value) if isinstance(value, list) else value)  # pyright: ignore[reportUnknownArgumentType]


def _unreadable(code: str, message: str, path: Path) -> N3CError:
    help_ = "name the folder that train.py was given as --out"
    return N3CError(Diagnostic(code, f"{path.name}: {message}", Span(str(path)), help=help_), ExitCode.FILE)
