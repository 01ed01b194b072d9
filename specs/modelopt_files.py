"""Where a checkpoint says its formats: config.json, hf_quant_config.json, or both, which must then agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError, Span

from .json_places import JsonPlaces
from .modelopt import Imported, find_quantization, formats_of_files
from .modelopt_entries import QuantizationError
from .modules import Group
from .pattern import Pattern


@dataclass(frozen=True, slots=True)
class HfQuantConfig:
    """The `quantization` object of a hf_quant_config.json, and where it stands."""

    table: Mapping[str, object]
    places: JsonPlaces
    path: tuple[str, ...] = ("quantization",)


@dataclass(frozen=True, slots=True)
class SaidFormats:
    """What one or two files say; the first is named in messages."""

    tables: tuple[Mapping[str, object], ...]
    places: JsonPlaces
    path: tuple[str, ...]

    @classmethod
    def of(cls, config: Mapping[str, object], places: JsonPlaces, beside: HfQuantConfig | None) -> SaidFormats | None:
        """Return what config.json and the file beside it say, None where neither does; N3CError for other tools'."""
        try:
            found = find_quantization({"quantization_config": config.get("quantization_config")})
        except QuantizationError as error:
            raise fault(error, places, ()) from None
        own = () if found is None else (found.table,)
        if beside is not None:
            return cls((beside.table, *own), beside.places, beside.path)
        return cls(own, places, ("quantization_config",)) if own else None

    @property
    def place(self) -> Span:
        """The place of the first."""
        return self.places.json_value(*self.path)

    def read(self, groups: Sequence[Group], pattern: Pattern) -> Imported:
        """Return the formats as rules; N3CError (SPEC) for what cannot be read, or differs."""
        try:
            return formats_of_files(self.tables, groups, pattern)
        except QuantizationError as error:
            raise fault(error, self.places, self.path) from None


def hf_quant_config(config: Mapping[str, object], places: JsonPlaces) -> HfQuantConfig:
    """Return what a hf_quant_config.json says; N3CError (SPEC) where it says nothing."""
    try:
        said = find_quantization(config)
        if said is None:
            raise QuantizationError("it says no quantization", ())
    except QuantizationError as error:
        raise fault(error, places, ()) from None
    return HfQuantConfig(said.table, places, said.path)


def fault(error: QuantizationError, places: JsonPlaces, root: tuple[str, ...]) -> N3CError:
    """Return the error about a quantization config whose object stands at `root`."""
    span = places.json_value(*root, *error.path)
    return N3CError(Diagnostic("E0305", error.message, span, help=error.advice), ExitCode.SPEC)
