"""The driver of `n3c quantize`: one checkpoint in, one in ModelOpt's layout out.

1 the formats that are asked for    2 the checkpoint fits    3 final formats and scales    4 pack, check, rename
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from n3c.backends.machine import peak_rss_bytes
from n3c.backends.modelopt.quantizer import Job, Outcome, quantize_checkpoint, small_files
from n3c.backends.progress import Progress
from n3c.backends.safetensors.checkpoint_fit import fitting_checkpoint
from n3c.backends.safetensors.layout import MAX_SHARD_BYTES
from n3c.ir.diagnostics import Diagnostic
from n3c.ir.formats import FORMATS
from n3c.passes.base import run_pipeline
from n3c.passes.lower.model import lower
from n3c.passes.quantize import Quantize
from n3c.runtime.options import usage_error
from n3c.specs.huggingface import export_config
from n3c.specs.rules import format_rules
from n3c.specs.schema import Spec

from .formats_and_scales import FormatsAndScales, formats_and_scales
from .provenance import provenance
from .reader_warnings import left_out_files, other_models_note, reader_warnings
from .request import QuantizeRequest
from .requested_formats import requested_formats, weight_only


@dataclass(frozen=True, slots=True)
class Quantized:
    """A finished run, or a finished part of one."""

    outcome: Outcome
    prepared: FormatsAndScales
    warnings: Sequence[Diagnostic]
    seconds: float
    peak_rss_bytes: int | None

    @property
    def out(self) -> Path:
        """The directory of the checkpoint."""
        return self.outcome.out

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
            "relative_error": [asdict(entry) for entry in outcome.checked],
            "seconds": round(self.seconds, 3),
            "peak_rss_bytes": self.peak_rss_bytes,
            "diagnostics": [warning.as_json() for warning in self.warnings],
        } | self.prepared.as_json()

    def formats(self) -> dict[str, dict[str, int]]:
        """Return how many weights have each format, and their bytes."""
        counts: dict[str, dict[str, int]] = {}
        for line in self.outcome.ledger:
            entry = counts.setdefault(line["format"], {"weights": 0, "bytes": 0})
            entry["weights"] += 1
            entry["bytes"] += line["bytes"]
        return dict(sorted(counts.items()))


def run(request: QuantizeRequest, progress: Progress) -> Quantized:
    """Quantize a checkpoint.

    Raises N3CError: exit code 2 for a budget that no choice of formats meets, 3 where the spec or a rule does not
    fit the model, 5 for numbers that are not finite, 6 for checkpoint and output. There is no output then.
    """
    start = time.perf_counter()
    progress.phase("read the headers")
    asked = requested_formats(request)
    _require_blocks(asked.spec, request)
    others = fitting_checkpoint(asked.spec, request.weights, unquantized=True).others
    whole = request.multimodal == "whole"
    if whole and not others:
        raise usage_error("--multimodal whole has no effect: the checkpoint holds one model")
    prepared = formats_and_scales(asked.spec, request, progress)
    names, notes = asked.notes_for(prepared.spec)
    scales = prepared.scales
    spec = prepared.spec if scales.inputs else weight_only(prepared.spec)
    program = lower(spec)
    run_pipeline(program, [Quantize(format_rules(spec, "quantization").annotated(names))], None)
    job = Job(
        source=request.weights,
        out=request.out,
        program=program,
        exported=export_config(spec),
        search=request.search,
        input_scales=scales.inputs,
        kv_scales=scales.cache,
        kv_cache="FP8" if scales.cache else None,
        resume=request.resume,
        part=request.part,
        max_shard_bytes=request.max_shard_bytes or MAX_SHARD_BYTES,
        with_others=whole,
        provenance=provenance(request, spec),
    )
    outcome = quantize_checkpoint(job, progress)
    told = reader_warnings(outcome.weights, scales, outcome.out, fp8_cache=spec.serving.kv_cache_dtype == "fp8")
    told += other_models_note(others.values(), whole=whole, out=outcome.out)
    told += left_out_files(small_files(request.weights))
    warnings = [*asked.warnings, *notes, *prepared.warnings, *told]
    return Quantized(outcome, prepared, warnings, time.perf_counter() - start, peak_rss_bytes())


def _require_blocks(spec: Spec, request: QuantizeRequest) -> None:
    """Raise N3CError (exit code 2) for options of block scales where no rule gives a format that has any."""
    table = spec.quantization
    if table is None or request.like is not None or request.effective_bits is not None:
        return  # formats that are taken or chosen later
    blocked = any(FORMATS[name].blocked for name in (table.format, *(rule.format for rule in table.rules)))
    for name, given in (("--block", request.block is not None), ("--search", request.search != "none")):
        if given and not blocked:
            raise usage_error(f"{name} has no effect: it needs a weight in nvfp4 or w4a16_nvfp4")
