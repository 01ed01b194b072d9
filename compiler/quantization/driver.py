"""The driver of `n3c quantize`: which spec, which formats, and what is told of the result."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from n3c.backends.progress import Progress
from n3c.compiler.report.tool_versions import peak_rss_bytes
from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError, Severity, Span, did_you_mean
from n3c.passes.base import run_pipeline
from n3c.passes.lower.model import lower
from n3c.passes.quantize import Quantize
from n3c.passes.serving import quantize_pass
from n3c.specs.convert import run_import
from n3c.specs.huggingface import export_config
from n3c.specs.load import load_spec, parse_spec
from n3c.specs.schema import BLOCKS, Format, Quantization, Spec

from .published import note as published_note
from .published import published_formats

if TYPE_CHECKING:
    from n3c.backends.safetensors.packing import Search
    from n3c.backends.safetensors.quantizer import Outcome

FORMATS = get_args(Format)
SEARCHES = ("none", "mse")
BLOCK_NAMES = {f"{rows}x{columns}": (rows, columns) for rows, columns in BLOCKS}


@dataclass(frozen=True, slots=True)
class Options:
    """How to quantize."""

    weights: Path
    out: Path
    search: Search = "none"
    resume: bool = False
    part: tuple[int, int] = (1, 1)
    max_shard_bytes: int | None = None
    input_scales: Mapping[str, float] = field(default_factory=dict[str, float])
    """Module → scale of its input: amax / 2688 for NVFP4, amax / 448 for FP8."""
    kv_scales: Mapping[str, float] = field(default_factory=dict[str, float])
    """`….k_proj.k_scale`, `….v_proj.v_scale` → amax / 448."""
    rule_names: Mapping[str, str] = field(default_factory=dict[str, str])
    """Path of a rule (`quantization.rules.0`) → what the ledger calls it besides."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """The spec to quantize by."""

    spec: Spec
    warnings: Sequence[Diagnostic]
    defaults: Mapping[str, str] = field(default_factory=dict[str, str])
    """Path of a rule → its name, where the formats are the published ones because nothing says any."""
    place: str = ""
    """The file that says no formats."""

    def names_for(self, spec: Spec) -> tuple[Mapping[str, str], list[Diagnostic]]:
        """Return the rules' names and the note about them where `spec` still has the default formats, else nothing."""
        table = spec.quantization
        if not self.defaults or table is None or table != self.spec.quantization:
            return {}, []
        return self.defaults, [published_note(table, self.defaults, self.place)]


@dataclass(slots=True)
class Quantized:
    """A finished run, or a finished part of one."""

    outcome: Outcome
    warnings: list[Diagnostic]
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """Return the form of `n3c quantize --json`."""
        outcome = self.outcome
        return {
            "ok": True,
            "out": str(outcome.out),
            "finished": outcome.finished,
            "shards": outcome.shards,
            "bytes": outcome.bytes,
            "formats": self.formats(),
            "relative_error": [dataclasses.asdict(entry) for entry in outcome.checked],
            "seconds": round(self.seconds, 3),
            "peak_rss_bytes": peak_rss_bytes(),
            "diagnostics": [warning.as_json() for warning in self.warnings],
        }

    def formats(self) -> dict[str, dict[str, int]]:
        """Return how many weights have each format, and their bytes."""
        counts: dict[str, dict[str, int]] = {}
        for line in self.outcome.ledger:
            entry = counts.setdefault(line["format"], {"weights": 0, "bytes": 0})
            entry["weights"] += 1
            entry["bytes"] += line["bytes"]
        return dict(sorted(counts.items()))


def chosen_spec(
    spec: Path | None,
    weights: Path,
    fmt: str | None,
    block: str | None,
    overrides: Sequence[str] = (),
    *,
    calibrated: bool = False,
) -> Chosen:
    """Return the spec, of the file or of the checkpoint's config, with --fmt and --block in its [quantization].

    `fmt` is the format of every linear that no rule names. Where neither spec nor config say any formats, they
    are the published ones (`sensitivity/published.py`). `calibrated`: whether there will be activation scales.
    Raises N3CError: exit code 3 for the spec and for a wrong value, 6 for a checkpoint without config.
    """
    if fmt is not None and fmt not in FORMATS:
        raise _wrong("--fmt", fmt, FORMATS)
    if block is not None and block not in BLOCK_NAMES:
        raise _wrong("--block", block, BLOCK_NAMES)
    place = weights / "config.json" if spec is None else spec
    silent = not any(override.startswith("quantization") for override in overrides)
    if spec is not None:
        found, warnings = load_spec(spec, overrides)
        silent = silent and found.quantization is None
    else:
        if not weights.is_dir():
            message = "no directory with a checkpoint"
            raise N3CError(Diagnostic("E0601", message, Span(str(weights))), ExitCode.FILE)
        imported = run_import(weights)
        found, warnings = imported.spec, list(imported.warnings)
        silent = silent and not imported.says_formats
        if overrides:
            found, _ = parse_spec(imported.text, str(place), overrides)
    if not silent:
        return Chosen(_with_formats(found, cast("Format | None", fmt), block), warnings)
    rows = BLOCK_NAMES[block or "1x16"]
    table, names = published_formats(found, cast("Format", fmt or "nvfp4"), rows, calibrated=calibrated)
    # The places of an imported table's rules say nothing of these.
    spans = {path: span for path, span in found.spans.items() if path.partition(".")[0] != "quantization"}
    return Chosen(dataclasses.replace(found, quantization=table, spans=spans), warnings, names, str(place))


def _wrong(option: str, value: str, known: Iterable[str]) -> N3CError:
    span = Span(option, 1, 1, max(1, len(value)), value)
    advice = did_you_mean(value, known) or f"choose one of {', '.join(known)}"
    return N3CError(Diagnostic("E0107", f"`{value}` is no value of {option}", span, help=advice), ExitCode.SPEC)


def _with_formats(spec: Spec, fmt: Format | None, block: str | None) -> Spec:
    table = spec.quantization or Quantization(format="nvfp4", block=(1, 16))
    if fmt is not None:
        table = dataclasses.replace(table, format=fmt)
    if block is not None:
        rows = BLOCK_NAMES[block]
        rules = tuple(dataclasses.replace(rule, block=None) for rule in table.rules)
        table = dataclasses.replace(table, block=rows, rules=rules)
    return dataclasses.replace(spec, quantization=table)


def weight_only(spec: Spec) -> Spec:
    """Return the spec with `w4a16_nvfp4` for `nvfp4`: what a checkpoint without activation scales is."""

    def renamed(format_: str) -> str:
        return "w4a16_nvfp4" if format_ == "nvfp4" else format_

    table = spec.quantization
    if table is None:
        return spec
    rules = tuple(dataclasses.replace(rule, format=renamed(rule.format)) for rule in table.rules)
    table = dataclasses.replace(table, format=cast("Format", renamed(table.format)), rules=rules)
    return dataclasses.replace(spec, quantization=table)


def quantize(spec: Spec, options: Options, progress: Progress) -> Quantized:
    """Quantize `options.weights` by the rules of `spec`.

    Raises N3CError: exit code 3 where a rule does not fit the model, 6 for checkpoint and output; no output then.
    """
    from n3c.backends.safetensors.checkpoint import Checkpoint
    from n3c.backends.safetensors.layout import MAX_SHARD_BYTES
    from n3c.backends.safetensors.quantizer import Job, quantize_checkpoint
    from n3c.backends.safetensors.sources import check_fit

    start = time.perf_counter()
    progress.phase("read the headers")
    if not options.input_scales:
        spec = weight_only(spec)
    program = lower(spec)
    check_fit(program.parameters.values(), Checkpoint(options.weights))
    run_pipeline(program, [_named(quantize_pass(spec), options.rule_names)], None)
    fp8_cache = spec.serving.kv_cache_dtype == "fp8" or bool(options.kv_scales)
    job = Job(
        source=options.weights,
        out=options.out,
        program=program,
        exported=export_config(spec),
        search=options.search,
        input_scales=options.input_scales,
        kv_scales=options.kv_scales,
        kv_cache="FP8" if fp8_cache else None,
        resume=options.resume,
        part=options.part,
        max_shard_bytes=options.max_shard_bytes or MAX_SHARD_BYTES,
    )
    outcome = quantize_checkpoint(job, progress)
    return Quantized(outcome, [*_uncalibrated(outcome), *_disagreeing(outcome)], time.perf_counter() - start)


def _named(pass_: Quantize, names: Mapping[str, str]) -> Quantize:
    """Return the pass with names behind the paths of its rules, as the ledger is to tell them."""
    rules = (
        dataclasses.replace(rule, path=f"{rule.path} ({names[rule.path]})") if rule.path in names else rule
        for rule in pass_.rules
    )
    return dataclasses.replace(pass_, rules=tuple(rules))


def _uncalibrated(outcome: Outcome) -> list[Diagnostic]:
    """Return warnings about what lacks a scale of its activations."""
    lacking = Counter(
        weight.format
        for weight in outcome.weights
        if weight.format in ("w4a16_nvfp4", "nvfp4", "fp8")
        and not any(name.endswith(".input_scale") for name, _ in weight.scalars)
    )
    place = Span(str(outcome.out))
    found: list[Diagnostic] = []
    if four := lacking["w4a16_nvfp4"] + lacking["nvfp4"]:
        message = f"{four} NVFP4 linears have no input_scale: the checkpoint says W4A16_NVFP4 of them"
        help_ = "--calibration or --activation-scales gives them"
        found.append(Diagnostic("W0621", message, place, Severity.WARNING, help_))
    if lacking["fp8"]:
        message = (
            f"{lacking['fp8']} FP8 linears have no input_scale: vLLM and SGLang load them without a word and compute"
            " nonsense, as they only know FP8 with a static scale of the input"
        )
        help_ = "give --calibration or --activation-scales, or their rules another format (bf16, w4a16_nvfp4)"
        found.append(Diagnostic("W0621", message, place, Severity.WARNING, help_))
    return found


def _disagreeing(outcome: Outcome) -> list[Diagnostic]:
    """Return a warning about linears of different formats that readers merge into one."""
    merged: dict[str, set[str]] = {}
    for weight in outcome.weights:
        parent, _, name = weight.module.rpartition(".")
        if name in ("q_proj", "k_proj", "v_proj"):
            merged.setdefault(f"{parent}.{{q,k,v}}_proj", set()).add(weight.format)
        elif parent.rpartition(".")[0].endswith(".experts"):
            merged.setdefault(parent.rpartition(".")[0], set()).add(weight.format)
    wrong = [name for name, formats in merged.items() if len(formats) > 1]
    if not wrong:
        return []
    message = f"`{wrong[0]}` has linears of different formats" + (f", and {len(wrong) - 1} more" * (len(wrong) > 1))
    help_ = "n3c reads them; vLLM and SGLang merge q, k and v, and all experts of a layer, and need one format for each"
    return [Diagnostic("W0623", message, Span(str(outcome.out)), Severity.WARNING, help_)]
