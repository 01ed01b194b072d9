"""The spec and the formats that a request names, before any are taken from a checkpoint or chosen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

from n3c.backends.safetensors.imported_spec import import_checkpoint
from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError, Span, did_you_mean
from n3c.ir.formats import FORMATS as WEIGHT_FORMATS
from n3c.specs.load import loaded, parse_spec
from n3c.specs.recipe import DEFAULT, NOTE, Recipe, is_published, published_recipe
from n3c.specs.rules_table import spec_with_quantization
from n3c.specs.schema import Format, Quantization, Spec

from .request import BLOCK_NAMES, FORMATS, QuantizeRequest

_HELP = "--write-spec FILE writes these rules; a [quantization] table of your own replaces them"


@dataclass(frozen=True, slots=True)
class RequestedFormats:
    """The spec to quantize by."""

    spec: Spec
    warnings: Sequence[Diagnostic]
    recipe: Recipe | None = None
    """The published recipe, where nobody chose other formats."""
    place: str = ""
    """The file in which they would stand."""

    def notes_for(self, spec: Spec) -> tuple[Mapping[str, str], list[Diagnostic]]:
        """Return the rules' names and a note about them where `spec` still has the formats of the recipe."""
        if self.recipe is None or spec.quantization != self.recipe.table:
            return {}, []
        return self.recipe.names_by_path, [replace(self.recipe.note(Span(self.place)), help=_HELP)]


@dataclass(frozen=True, slots=True)
class _Source:
    """A spec as it was found."""

    spec: Spec
    place: str
    warnings: Sequence[Diagnostic] = field(default_factory=list[Diagnostic])


def requested_formats(request: QuantizeRequest) -> RequestedFormats:
    """Return the spec, of the file or of the checkpoint's config, with --fmt and --block in its [quantization].

    Where nobody chose formats, they are those of the published recipe. Raises N3CError: exit code 2 for a wrong value,
    3 for the spec, 6 for a checkpoint without config.
    """
    if request.fmt is not None and request.fmt not in FORMATS:
        raise _wrong("--fmt", request.fmt, FORMATS)
    if request.block is not None and request.block not in BLOCK_NAMES:
        raise _wrong("--block", request.block, BLOCK_NAMES)
    found = _of_checkpoint(request) if request.spec is None else _of_file(request)
    table = _with_options(found.spec.quantization or DEFAULT, request)
    if any(override.startswith("quantization") for override in request.overrides) or not is_published(found.spec):
        return RequestedFormats(replace(found.spec, quantization=table), found.warnings)
    recipe = published_recipe(found.spec, table.format, table.block, calibrated=request.calibrated)
    return RequestedFormats(spec_with_quantization(found.spec, recipe.table), found.warnings, recipe, found.place)


def _of_file(request: QuantizeRequest) -> _Source:
    assert request.spec is not None
    spec, warnings = loaded(request.spec, request.overrides)
    return _Source(spec, spec.name if isinstance(request.spec, Spec) else str(request.spec), warnings)


def _of_checkpoint(request: QuantizeRequest) -> _Source:
    if not request.weights.is_dir():
        message = "no directory with a checkpoint"
        raise N3CError(Diagnostic("E0601", message, Span(str(request.weights))), ExitCode.FILE)
    place = str(request.weights / "config.json")
    imported = import_checkpoint(request.weights)
    warnings = [found for found in imported.warnings if found.code != NOTE]  # told of the formats that are taken
    if not request.overrides:
        return _Source(imported.spec, place, warnings)
    return _Source(parse_spec(imported.text, place, request.overrides)[0], place, warnings)


def _wrong(option: str, value: str, known: Iterable[str]) -> N3CError:
    span = Span(option, 1, 1, max(1, len(value)), value)
    advice = did_you_mean(value, known) or f"choose one of {', '.join(known)}"
    return N3CError(Diagnostic("E0701", f"`{value}` is no value of {option}", span, help=advice), ExitCode.USAGE)


def _with_options(table: Quantization, request: QuantizeRequest) -> Quantization:
    if request.fmt is not None:
        table = replace(table, format=cast("Format", request.fmt))
    if request.block_shape is not None:
        rules = tuple(replace(rule, block=None) for rule in table.rules)
        table = replace(table, block=request.block_shape, rules=rules)
    return table


def weight_only(spec: Spec) -> Spec:
    """Return the spec in the formats that a checkpoint without activation scales has: `w4a16_nvfp4` for `nvfp4`."""
    table = spec.quantization
    if table is None:
        return spec

    def renamed(name: str) -> str:
        return WEIGHT_FORMATS[name].weight_only or name

    rules = tuple(replace(rule, format=renamed(rule.format)) for rule in table.rules)
    return replace(spec, quantization=replace(table, format=cast("Format", renamed(table.format)), rules=rules))
