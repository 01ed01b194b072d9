"""`--like`: the formats of a released checkpoint, layer by layer, for another checkpoint of the same model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError, Severity, Span
from n3c.specs.files import read_text
from n3c.specs.json_places import JsonPlaces, parse_json
from n3c.specs.modelopt import Said, find_quantization, formats_of_files
from n3c.specs.modelopt_entries import QuantizationError
from n3c.specs.modules import groups_of
from n3c.specs.places import shown
from n3c.specs.rules_table import spec_with_table
from n3c.specs.schema import Spec

FILES = ("hf_quant_config.json", "config.json")
"""Where a checkpoint says its formats."""


def spec_like(spec: Spec, path: Path, block: tuple[int, int] | None) -> tuple[Spec, list[Diagnostic]]:
    """Return `spec` with the formats, and the type of the KV cache, that ModelOpt's config at `path` gives.

    `path` is a checkpoint directory, its hf_quant_config.json, or its config.json. `block` is that of
    NVFP4 weights; ModelOpt's own, [1, 16], without. Raises N3CError (exit code 3) for a config that
    cannot be read or is of another model, (exit code 6) for a missing file.
    """
    said = _said(path)
    if not said:
        raise N3CError(Diagnostic("E0305", "it says no quantization", Span(str(_files(path)[0]))), ExitCode.SPEC)
    places, root = said[0].places, said[0].found.path
    try:
        imported = formats_of_files([one.found.table for one in said], groups_of(spec), spec.model.pattern)
    except QuantizationError as error:
        raise _fault(error, places, root) from None
    rules = imported.table["rules"]
    if imported.unknown and imported.table["format"] == "bf16" and not rules:
        message = (
            f"of {len(imported.unknown)} modules that it names this model has none, as `{_first(imported.unknown)}`"
        )
        help_ = "take the formats from a checkpoint of the same model"
        raise N3CError(Diagnostic("E0406", message, places.json_value(*root), help=help_), ExitCode.SPEC)
    made = spec_with_table(spec, imported.table, block)
    if imported.kv_cache_dtype == "fp8":
        made = replace(made, serving=replace(made.serving, kv_cache_dtype="fp8"))
    warnings: list[Diagnostic] = []
    if imported.unknown:
        message = f"{len(imported.unknown)} names of the quantization match no module, as `{_first(imported.unknown)}`"
        warnings.append(Diagnostic("W0303", message, places.json_value(*root), Severity.WARNING))
    return made, warnings


def _first(names: tuple[str, ...]) -> str:
    return shown(names[0])


@dataclass(frozen=True, slots=True)
class _Said:
    """What one file says of formats."""

    found: Said
    places: JsonPlaces


def _said(path: Path) -> list[_Said]:
    """Return what each file of a checkpoint, or the one file `path`, says of formats."""
    found: list[_Said] = []
    for file in _files(path):
        config, places = parse_json(read_text(file), str(file))
        try:
            said = find_quantization(config)
        except QuantizationError as error:
            raise _fault(error, places, ()) from None
        if said is not None:
            found.append(_Said(said, places))
    return found


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = [path / name for name in FILES if (path / name).is_file()]
    if not found:
        message = f"neither {' nor '.join(FILES)} in this directory"
        raise N3CError(Diagnostic("E0601", message, Span(str(path))), ExitCode.FILE)
    return found


def _fault(error: QuantizationError, places: JsonPlaces, root: tuple[str, ...]) -> N3CError:
    span = places.json_value(*root, *error.path)
    return N3CError(Diagnostic("E0305", error.message, span, help=error.advice), ExitCode.SPEC)
