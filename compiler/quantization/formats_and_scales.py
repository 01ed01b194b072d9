"""The final formats of a request, taken from a checkpoint or chosen, and the scales of activations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from n3c.backends.progress import Progress
from n3c.backends.safetensors.checkpoint import Checkpoint
from n3c.compiler.quantization.calibration.activation_scales import (
    Scales,
    entries_of,
    ledger,
    load_scales,
    resolve,
    save_scales,
)
from n3c.compiler.quantization.calibration.calibrate import calibrate
from n3c.compiler.quantization.calibration.streamed_model import StreamedModel
from n3c.compiler.quantization.search.sensitivity import Chosen, measure
from n3c.ir.diagnostics import Diagnostic
from n3c.ir.formats import FORMATS
from n3c.specs.dump import dump_spec
from n3c.specs.files import write_text
from n3c.specs.layer_tables import moe_tables
from n3c.specs.schema import Spec

from .calibration.tokens import read_tokens
from .checkpoint_formats import spec_like
from .request import QuantizeRequest

if TYPE_CHECKING:
    from torch import Tensor

BYTES = 256
"""The vocabulary in which each byte is a token."""


@dataclass(frozen=True, slots=True)
class FormatsAndScales:
    """The final spec and the scales of activations, by which weights are packed."""

    spec: Spec
    scales: Scales = field(default_factory=Scales)
    opened: list[str] = field(default_factory=list[str])
    """What was read to calibrate, a line a source."""
    warnings: list[Diagnostic] = field(default_factory=list[Diagnostic])
    chosen: Chosen | None = None

    def as_json(self) -> dict[str, Any]:
        """Return what `n3c quantize --json` tells of it."""
        data: dict[str, Any] = {} if self.chosen is None else {"auto": self.chosen.as_json()}
        data |= {"calibration": self.opened} if self.opened else {}
        return data | {"activation_scales": {"inputs": len(self.scales.inputs), "cache": len(self.scales.cache)}}


def formats_and_scales(spec: Spec, request: QuantizeRequest, progress: Progress) -> FormatsAndScales:
    """Return `spec` with its final formats, and the scales of activations, where the request gives data for them.

    --block outranks a format map. Raises N3CError as the parts do.
    """
    warnings: list[Diagnostic] = []
    if request.like is not None:
        spec, warnings = spec_like(spec, request.like, request.block_shape)
    ids, opened = _tokens(spec, request)
    chosen = _chosen(spec, request, ids, progress)
    spec = spec if chosen is None else chosen.spec
    if request.write_spec is not None:
        write_text(request.write_spec, _header(chosen) + dump_spec(spec))
    entries = _scale_entries(spec, request, ids, chosen, progress)
    source = request.activation_scales or (request.calibration.path if request.calibration else None)
    scales = Scales() if entries is None else resolve(spec, entries, source)
    return FormatsAndScales(spec, scales, opened, warnings, chosen)


def _chosen(spec: Spec, request: QuantizeRequest, ids: Tensor | None, progress: Progress) -> Chosen | None:
    """Return the formats that --auto chooses; None without it."""
    bits = request.effective_bits
    if bits is None:
        return None
    progress.phase("measure sensitivity")
    sensitivity = measure(spec, Checkpoint(request.weights), progress, ids=ids, mtp=request.mtp, at_least=bits)
    return sensitivity.within(bits)


def _scale_entries(
    spec: Spec, request: QuantizeRequest, ids: Tensor | None, chosen: Chosen | None, progress: Progress
) -> Mapping[str, float] | None:
    """Return the scales of activations, by name: of a file, or of the calibration tokens `ids`; None without either."""
    if request.activation_scales is not None:
        return load_scales(request.activation_scales, spec)
    if ids is None:
        return None
    amax = None if chosen is None else chosen.amax
    if amax is None:
        progress.phase("calibrate")
        amax = calibrate(StreamedModel(spec, Checkpoint(request.weights)), ids, progress, mtp=_quantizes_mtp(spec))
    entries = entries_of(amax)
    if request.save_activation_scales is not None:
        save_scales(request.save_activation_scales, entries)
    return entries


def _tokens(spec: Spec, request: QuantizeRequest) -> tuple[Tensor | None, list[str]]:
    """Return the calibration tokens [N, L], and what they were read from; text by the checkpoint's own tokenizer."""
    data = request.calibration
    if data is None:
        return None, []
    if data.tokenizer is None and spec.model.vocab_size != BYTES and (request.weights / "tokenizer.json").is_file():
        data = replace(data, tokenizer=request.weights)
    # Fewer choices than experts take another path through the model, where nothing is recorded.
    least = max((2, *(-(-moe.num_experts // moe.top_k) for moe in moe_tables(spec))))
    return read_tokens(spec, data, least=least)


def _quantizes_mtp(spec: Spec) -> bool:
    return any(entry.role.startswith("mtp.") and _quantizes_activations(entry.format) for entry in ledger(spec))


def _quantizes_activations(format_: str) -> bool:
    return format_ in FORMATS and FORMATS[format_].input_divisor is not None


def _header(chosen: Chosen | None) -> str:
    if chosen is None:
        return ""
    counts: dict[str, int] = {}
    for unit in chosen.units:
        format_ = chosen.formats[unit.name]
        counts[format_] = counts.get(format_, 0) + unit.weights
    shares = ", ".join(f"{format_} {count:,} weights" for format_, count in sorted(counts.items()))
    return (
        f"# Formats chosen by n3c quantize --auto from {chosen.method}: {chosen.bits:.4f} bits a weight, over the\n"
        f"# linears that it may quantize ({shares}).\n"
    )
