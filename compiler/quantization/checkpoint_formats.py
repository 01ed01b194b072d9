"""`--like`: the formats of a released checkpoint, layer by layer, for another checkpoint of the same model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError, Severity, Span
from n3c.specs.files import read_text
from n3c.specs.json_places import parse_json
from n3c.specs.modelopt_files import SaidFormats, hf_quant_config
from n3c.specs.modules import groups_of
from n3c.specs.places import shown
from n3c.specs.rules_table import spec_with_table
from n3c.specs.schema import Spec

HF_QUANT_CONFIG, CONFIG = FILES = ("hf_quant_config.json", "config.json")
"""Where a checkpoint says its formats."""


def spec_like(spec: Spec, path: Path, block: tuple[int, int] | None) -> tuple[Spec, list[Diagnostic]]:
    """Return `spec` with the formats, and the type of the KV cache, that ModelOpt's config at `path` gives.

    `path` is a checkpoint directory, its hf_quant_config.json, or its config.json. `block` is that of
    NVFP4 weights; ModelOpt's own, [1, 16], without. Raises N3CError (exit code 3) for a config that
    cannot be read or is of another model, (exit code 6) for a missing file.
    """
    said = _said(path)
    imported = said.read(groups_of(spec), spec.model.pattern)
    rules = imported.table["rules"]
    if imported.unknown and imported.table["format"] == "bf16" and not rules:
        message = (
            f"of {len(imported.unknown)} modules that it names this model has none, as `{_first(imported.unknown)}`"
        )
        help_ = "take the formats from a checkpoint of the same model"
        raise N3CError(Diagnostic("E0406", message, said.place, help=help_), ExitCode.SPEC)
    made = spec_with_table(spec, imported.table, block)
    if imported.kv_cache_dtype == "fp8":
        made = replace(made, serving=replace(made.serving, kv_cache_dtype="fp8"))
    warnings: list[Diagnostic] = []
    if imported.unknown:
        message = f"{len(imported.unknown)} names of the quantization match no module, as `{_first(imported.unknown)}`"
        warnings.append(Diagnostic("W0303", message, said.place, Severity.WARNING))
    return made, warnings


def _first(names: tuple[str, ...]) -> str:
    return shown(names[0])


def _said(path: Path) -> SaidFormats:
    """Return what the files of a checkpoint, or the one file `path`, say of formats."""
    if not path.is_dir():
        one = hf_quant_config(*parse_json(read_text(path), str(path)))
        return SaidFormats((one.table,), one.places, one.path)
    files = {name: path / name for name in FILES if (path / name).is_file()}
    if not files:
        message = f"neither {' nor '.join(FILES)} in this directory"
        raise N3CError(Diagnostic("E0601", message, Span(str(path))), ExitCode.FILE)
    read = {name: parse_json(read_text(file), str(file)) for name, file in files.items()}
    beside = hf_quant_config(*read[HF_QUANT_CONFIG]) if HF_QUANT_CONFIG in read else None
    config, places = read.get(CONFIG, ({}, None))
    said = SaidFormats.of(config, places or next(iter(read.values()))[1], beside)
    if said is None:
        raise N3CError(Diagnostic("E0305", "it says no quantization", Span(str(files[CONFIG]))), ExitCode.SPEC)
    return said
