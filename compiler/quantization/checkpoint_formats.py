"""`--like`: the formats of a released checkpoint, layer by layer, for another checkpoint of the same model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError, Severity, Span
from n3c.specs.files import read_text
from n3c.specs.json_places import JsonPlaces, parse_json
from n3c.specs.modelopt import QuantizationError, import_quantization
from n3c.specs.modules import groups_of
from n3c.specs.places import shown
from n3c.specs.rules_table import spec_with_table
from n3c.specs.schema import Spec

FILES = ("hf_quant_config.json", "config.json")
"""Where a checkpoint says its formats, the first that is there."""


def spec_like(spec: Spec, path: Path, block: tuple[int, int] | None) -> tuple[Spec, list[Diagnostic]]:
    """Return `spec` with the formats, and the type of the KV cache, that ModelOpt's config at `path` gives.

    `path` is a checkpoint directory, its hf_quant_config.json, or its config.json. `block` is that of
    NVFP4 weights; ModelOpt's own, [1, 16], without. Raises N3CError (exit code 3) for a config that
    cannot be read or is of another model, (exit code 6) for a missing file.
    """
    file = _file(path)
    config, places = parse_json(read_text(file), str(file))
    root, quantization = _quantization(config, places)
    try:
        imported = import_quantization(quantization, groups_of(spec), spec.model.pattern)
    except QuantizationError as error:
        span = places.json_value(*root, *error.path)
        raise N3CError(Diagnostic("E0305", error.message, span, help=error.advice), ExitCode.SPEC) from None
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


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in FILES:
        if (path / name).is_file():
            return path / name
    message = f"neither {' nor '.join(FILES)} in this directory"
    raise N3CError(Diagnostic("E0601", message, Span(str(path))), ExitCode.FILE)


def _quantization(config: Mapping[str, object], places: JsonPlaces) -> tuple[tuple[str, ...], Mapping[str, object]]:
    """Return the object that says the formats, and where it is."""
    for key in ("quantization", "quantization_config"):
        value = config.get(key)
        if isinstance(value, dict):
            table = cast("dict[str, object]", value)
            if table.get("quant_method", "modelopt") != "modelopt":
                message = "only ModelOpt's quantization configs are supported"
                raise N3CError(Diagnostic("E0305", message, places.json_value(key, "quant_method")), ExitCode.SPEC)
            if table.get("quant_algo") is not None:
                return (key,), table
    raise N3CError(Diagnostic("E0305", "it says no quantization", places.start), ExitCode.SPEC)
