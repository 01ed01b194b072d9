"""Quantizing a checkpoint: plan from the headers, make the shards, read them back, rename into place.

Peak memory does not depend on the checkpoint. The result depends on nothing but checkpoint, spec and
options: one run, a run that was killed and resumed, and parts on several machines give the same bytes.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from n3c.backends.hashing import file_rows
from n3c.backends.machine import usable_cores
from n3c.backends.progress import Progress
from n3c.backends.safetensors.checkpoint import INDEX, Checkpoint, file_error
from n3c.backends.safetensors.header import stored_bytes
from n3c.backends.safetensors.layout import (
    KEEP,
    MAX_SHARD_BYTES,
    Shard,
    Weight,
    fingerprint,
    index_json,
    plan_shards,
    plan_weights,
)
from n3c.backends.safetensors.locate import require_outside
from n3c.backends.safetensors.misfits import EMBEDDING, HEAD
from n3c.backends.safetensors.packing import Search
from n3c.backends.safetensors.resume import Done, WorkDirectory, require_new
from n3c.backends.safetensors.selfcheck import Checked, check
from n3c.backends.safetensors.stream import BAND_BYTES, JOURNAL_BYTES, Quantizer, make_shard
from n3c.ir.diagnostics import N3CError
from n3c.ir.formats import NVFP4_BLOCK
from n3c.ir.json_file import is_count, is_lfs_file, read_json
from n3c.ir.program import Program
from n3c.specs.multimodal import text_config

from .layout import algorithm, config_json, hf_quant_config, is_quantized, multimodal_config
from .record import CARD, RECORD, SOURCE_CARD, Provenance, model_card, record

LEDGER = "n3c_ledger.json"
_MAX_LEDGER = 1 << 28
"""Bytes; a 550B checkpoint's is a tenth of it."""
_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")
_REPLACED = ("config.json", "hf_quant_config.json", LEDGER, RECORD, SOURCE_CARD)


@dataclass(frozen=True, slots=True)
class Job:
    """A checkpoint to quantize, and how."""

    source: Path
    out: Path
    program: Program
    """After the pass `quantize`: its parameters say which weight gets which format."""
    exported: Mapping[str, Any]
    """The spec as a Hugging Face config: `specs.huggingface.export_config`."""
    search: Search = "none"
    input_scales: Mapping[str, float] = field(default_factory=dict[str, float])
    """Module → input_scale: amax of its input / 2688 for NVFP4, / 448 for FP8."""
    kv_scales: Mapping[str, float] = field(default_factory=dict[str, float])
    """Tensor (`….k_proj.k_scale`) → amax / 448."""
    kv_cache: str | None = None
    """ "FP8" or None."""
    resume: bool = False
    part: tuple[int, int] = (1, 1)
    """I of N: every N-th shard, beginning with the I-th. Only (1, 1) ends with the output in place."""
    max_shard_bytes: int = MAX_SHARD_BYTES
    provenance: Provenance = field(default_factory=Provenance)
    with_others: bool = False
    """Whether the other models of a multimodal checkpoint are carried."""
    threads: int | None = None
    band_bytes: int = BAND_BYTES
    """Source bytes of a weight that are packed at once; the result does not depend on it."""
    journal_bytes: int = JOURNAL_BYTES
    """Result bytes after which what is done survives a crash."""


@dataclass(slots=True)
class Outcome:
    """The result of a run."""

    out: Path
    finished: bool
    """False where parts are left to be made or joined."""
    weights: Sequence[Weight]
    ledger: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    checked: list[Checked] = field(default_factory=list[Checked])
    shards: int = 0
    bytes: int = 0


def quantize_checkpoint(job: Job, progress: Progress) -> Outcome:
    """Make `job.out`; N3CError (exit code 6), without output, where source or output cannot be used."""
    checkpoint = Checkpoint(job.source)
    if job.exported["tie_word_embeddings"] and HEAD not in checkpoint:
        checkpoint.repeat(EMBEDDING, HEAD)  # transformers does not tie them
    spellings = checkpoint.add_others() if job.with_others else None
    config = _source_config(job.source)
    weights = plan_weights(job.program, checkpoint, job.input_scales, job.kv_scales, spellings)
    shards = plan_shards(weights, job.max_shard_bytes)
    mark = fingerprint(shards, job.search)
    outcome = Outcome(job.out, False, weights, shards=len(shards), bytes=sum(shard.size for shard in shards))
    work, whole = WorkDirectory(job.out, progress.phase), job.part == (1, 1)
    finished = _finished(job, mark)
    if finished is not None:
        work.clear()
        outcome.ledger, outcome.finished = finished, True
        return outcome
    _require_place(job, work, shards)
    with work.claimed(_plan(mark, checkpoint, job), job.part, resume=job.resume):
        try:
            done = _make(job, checkpoint, weights, shards, work, progress)
            if not whole:
                return outcome
            progress.phase("check the result")
            outcome.ledger = _ledger(shards, done)
            files: dict[str, Mapping[str, Any]] = {
                "config.json": _config(config, job, weights),
                INDEX: index_json(shards),
                LEDGER: {"schema": 1, "plan": mark, "search": job.search, "weights": outcome.ledger},
            }
            if is_quantized(weights):
                files["hf_quant_config.json"] = hf_quant_config(weights, job.kv_cache)
            _write_files(files, work.result, job.source)
            outcome.checked = check(checkpoint, _read_back(work.result, job), shards)
            progress.phase("hash")
            _write_record(job, work.result, checkpoint, shards, outcome)
            work.finish()
        except N3CError as error:
            if whole and any(d.code in ("E0607", "E0609", "E0618") for d in error.diagnostics):
                work.discard()  # what is wrong is in the files: nothing of it can be continued
            raise
        except OSError as error:
            reason = error.strerror or str(error)
            help_ = f"make space and run again with --resume; what is done is kept in {work.folder}"
            raise file_error("E0613", f"writing the output failed: {reason}", job.out, help_) from error
    outcome.finished = True
    return outcome


def _make(
    job: Job,
    checkpoint: Checkpoint,
    weights: Sequence[Weight],
    shards: Sequence[Shard],
    work: WorkDirectory,
    progress: Progress,
) -> dict[str, Done]:
    """Make the shards of this part; return what is done of all."""
    part, parts = job.part
    mine = [shard for i, shard in enumerate(shards) if i % parts == part - 1]
    total, at = sum(shard.size for shard in mine), 0

    def wrote(count: int) -> None:
        nonlocal at
        at += count
        progress.step("MB written", at // 1_000_000, max(1, total // 1_000_000))

    progress.phase("quantize")
    done = work.done(shards)
    threads = job.threads or usable_cores()
    resume = job.resume or parts == 1
    with work.journal(job.part, resume) as journal, ThreadPoolExecutor(threads) as pool:
        quantizer = Quantizer(checkpoint, weights, job.search, job.band_bytes)
        for shard in mine:
            state = done[shard.file]
            if state.weights < len(shard.weights):
                path = work.result / shard.file
                make_shard(
                    shard,
                    path,
                    state,
                    quantizer,
                    journal=journal,
                    pool=pool,
                    progress=wrote,
                    journal_bytes=job.journal_bytes,
                )
            else:
                wrote(shard.size)
    return done


def _source_config(source: Path) -> dict[str, Any]:
    path = source / "config.json"
    try:
        config = read_json(path)
    except OSError as error:
        raise file_error("E0601", f"cannot read config.json: {error.strerror or error}", path) from error
    except ValueError as error:
        raise file_error("E0601", f"config.json cannot be read: {error}", path) from error
    if not isinstance(config, dict):
        raise file_error("E0601", "config.json is not a JSON object", path)
    return cast("dict[str, Any]", config)


def _config(source: dict[str, Any], job: Job, weights: Sequence[Weight]) -> dict[str, Any]:
    """Return config.json: that of the text model, or of all models where they are carried."""
    name, text = text_config(source) or ("", source)
    config = config_json(text, job.exported, weights, job.kv_cache)
    return multimodal_config(source, name, config) if job.with_others else config


def _read_back(folder: Path, job: Job) -> Checkpoint:
    result = Checkpoint(folder)
    if job.with_others:
        result.add_others()
    return result


def _finished(job: Job, mark: str) -> list[dict[str, Any]] | None:
    """Return the ledger of the output if that is there already, made by this very plan: nothing is left to do."""
    if not job.resume:
        return None
    try:
        found = cast("Any", read_json(job.out / LEDGER, _MAX_LEDGER))
        lines = cast("list[dict[str, Any]]", found["weights"])
        whole = isinstance(found["weights"], list) and all(is_count(line["bytes"]) for line in lines)
        named = all(isinstance(line[key], str) for line in lines for key in ("name", "format"))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return lines if found["plan"] == mark and whole and named else None


def _require_place(job: Job, work: WorkDirectory, shards: Sequence[Shard]) -> None:
    """Raise N3CError before any work where the output is there, or has no space, or overlaps with the source."""
    out, source = job.out.resolve(), job.source.resolve()
    require_new(job.out)
    require_outside(job.out, [job.source])
    if work.folder == source or work.folder in source.parents:
        message = f"the checkpoint is inside {work.folder}, in which this output is made"
        raise file_error("E0612", message, job.out, "move the checkpoint, or choose another -o")
    try:
        free = shutil.disk_usage(next(folder for folder in out.parents if folder.exists())).free
        kept = sum(_allocated(path) for path in work.result.glob("*"))
    except (OSError, ValueError) as error:
        raise file_error("E0612", f"the output cannot be written here: {error}", job.out) from error
    wanted = sum(shard.size for i, shard in enumerate(shards) if i % job.part[1] == job.part[0] - 1)
    if wanted > free + kept:
        message = f"the output needs {wanted / 1e9:.1f} GB, the disk has {(free + kept) / 1e9:.1f} GB left"
        raise file_error("E0613", message, job.out, "make space, or choose another -o")


def _allocated(path: Path) -> int:
    """Return the bytes of the disk that a file has; where the system does not tell, those that it will have."""
    status = path.stat()
    blocks: int | None = getattr(status, "st_blocks", None)  # Windows has none
    return status.st_size if blocks is None else blocks * 512


def _plan(mark: str, checkpoint: Checkpoint, job: Job) -> dict[str, Any]:
    files = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in checkpoint.files()]
    return {"schema": 1, "plan": mark, "source": files, "max_shard_bytes": job.max_shard_bytes}


def _ledger(shards: Sequence[Shard], done: Mapping[str, Done]) -> list[dict[str, Any]]:
    """Return a line for each weight: its rule, format, bytes, and the noise of packing."""
    lines: list[dict[str, Any]] = []
    for shard in shards:
        figures = done[shard.file].figures
        for weight in shard.weights:
            line: dict[str, Any] = {
                "name": weight.name,
                "role": weight.role,
                "shape": list(weight.shape),
                "rule": weight.rule,
                "format": weight.dtype.lower() if weight.format == KEEP else weight.format,
                "bytes": sum(stored_bytes(dtype, shape) for dtype, shape in weight.stored().values()),
            }
            if weight.format != KEEP:
                signal, noise, other = figures[weight.name]
                line |= {"algorithm": algorithm(weight), "sqnr_db": _decibels(signal, noise)}
                if weight.block_rows:
                    line["block"] = [weight.block_rows, NVFP4_BLOCK]
                    other_rows = 17 - weight.block_rows
                    if weight.shape[0] % other_rows == 0:
                        line[f"sqnr_db_{other_rows}x16"] = _decibels(signal, other)
            lines.append(line)
    return lines


def _decibels(signal: float, noise: float) -> float | None:
    """Return 10 · log10(signal / noise); None where there is no noise, or no signal."""
    return round(10 * math.log10(signal / noise), 3) if signal > 0 and noise > 0 else None


def _write_files(files: Mapping[str, Mapping[str, Any]], folder: Path, source: Path) -> None:
    """Write what stands beside the shards: `files`, name → content, and the files of the source without weights."""
    for path in small_files(source):
        if not is_lfs_file(path):
            shutil.copyfile(path, folder / (SOURCE_CARD if path.name == CARD else path.name))
    for name, content in files.items():
        _write(folder / name, json.dumps(content, indent=1) + "\n")


def small_files(source: Path) -> list[Path]:
    """Return the files of a checkpoint that are carried to what is made of it: tokenizer, templates, code and texts."""
    return [
        path
        for path in sorted(source.iterdir())
        if path.is_file()
        and path.name not in _REPLACED
        and not path.name.startswith(".")
        and not path.name.endswith(_WEIGHT_FILES)
    ]


def _write_record(job: Job, folder: Path, source: Checkpoint, shards: Sequence[Shard], outcome: Outcome) -> None:
    """Write the record of the finished result, and the card that tells it."""
    read = [path.name for path in source.files()] + ["config.json"]
    rows = {
        "source": file_rows(source.directory, read),
        "files": file_rows(folder, sorted(path.name for path in folder.iterdir() if path.is_file())),
    }
    made = record(job.provenance, shards, outcome.ledger, outcome.checked, rows)
    _write(folder / RECORD, json.dumps(made, indent=1) + "\n")
    _write(folder / CARD, model_card(made, job.provenance.in_transformers))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
    with path.open("rb") as file:
        os.fsync(file.fileno())
