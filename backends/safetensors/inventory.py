"""The inventory of a checkpoint, from its headers alone: BF16, ModelOpt's layout or compressed-tensors'.

    ModelOpt            X.weight u8, X.weight_scale e4m3, X.weight_scale_2 f32 [], X.input_scale f32 []
    compressed-tensors  X.weight_packed u8, X.weight_scale e4m3, X.weight_global_scale f32 [1], X.input_global_scale

The packed bytes and block scales are the same; compressed-tensors' global scales are reciprocals
(compressed_tensors 0.20, entrypoints/convert).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from n3c.ir.formats import CACHE_SCALES, FORMATS, FP8, INPUT_SCALE, NVFP4, WeightFormat

from .checkpoint import Checkpoint
from .header import CODES

_COMPRESSED = ("_packed", "_global_scale", "_shape", "_zero_point")
"""Suffixes of compressed-tensors."""
_ROOTS = (*_COMPRESSED, *sorted({part.suffix for f in FORMATS.values() for part in f.scales}, reverse=True))
"""Suffixes after the name of a weight, the longer first where one ends with another."""
_OF_MODULE = (INPUT_SCALE, ".input_global_scale", *CACHE_SCALES)


@dataclass(frozen=True, slots=True)
class Inventory:
    """Counts of one checkpoint."""

    layout: str
    """`plain`, `modelopt` or `compressed-tensors`."""
    files: int
    tensors: int
    bytes: int
    by_format: dict[str, tuple[int, int]]
    """Format → weights, and their bytes with scales."""

    def as_json(self) -> dict[str, Any]:
        """Return the form of `inspect --json`, key `checkpoint`."""
        formats = {name: {"weights": count, "bytes": size} for name, (count, size) in self.by_format.items()}
        return {
            "layout": self.layout,
            "files": self.files,
            "tensors": self.tensors,
            "bytes": self.bytes,
            "by_format": formats,
        }


def weight_formats(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the format of each weight, from the tensors that store it."""
    return {weight: _format(weight, sizes, checkpoint) for weight, sizes in _parts(checkpoint).items()}


def _parts(checkpoint: Checkpoint) -> dict[str, dict[str, int]]:
    """Return for each weight its parts, each with its bytes."""
    parts: dict[str, dict[str, int]] = {}
    for name in checkpoint:
        weight, part = _split(name, checkpoint)
        parts.setdefault(weight, {})[part] = checkpoint.bytes(name)
    return parts


def inventory(checkpoint: Checkpoint) -> Inventory:
    """Count weights and bytes by format."""
    parts = _parts(checkpoint)
    by_format: dict[str, tuple[int, int]] = {}
    for weight, sizes in parts.items():
        format_ = _format(weight, sizes, checkpoint)
        count, size = by_format.get(format_, (0, 0))
        by_format[format_] = count + 1, size + sum(sizes.values())
    found = {part for sizes in parts.values() for part in sizes}
    layout = "compressed-tensors" if "_packed" in found or "_global_scale" in found else "plain"
    if layout == "plain" and "_scale" in found:
        layout = "modelopt"
    total = sum(checkpoint.bytes(name) for name in checkpoint)
    return Inventory(layout, len(checkpoint.files()), len(list(checkpoint)), total, dict(sorted(by_format.items())))


def _split(name: str, checkpoint: Checkpoint) -> tuple[str, str]:
    """Return the weight that a tensor belongs to, and which part of it it is; the weight itself is part ``""``."""
    for suffix in _OF_MODULE:
        if name.endswith(suffix):
            return f"{name.removesuffix(suffix)}.weight", suffix
    for suffix in _ROOTS:
        weight = name.removesuffix(suffix)
        if weight != name and weight.endswith(".weight") and (weight in checkpoint or f"{weight}_packed" in checkpoint):
            return weight, suffix
    return name, ""


def _format(weight: str, sizes: dict[str, int], checkpoint: Checkpoint) -> str:
    activations = INPUT_SCALE in sizes or ".input_global_scale" in sizes
    if "_packed" in sizes or _is_stored_as(NVFP4, weight, sizes, checkpoint):
        return NVFP4.name if activations else NVFP4.weight_only
    if weight not in checkpoint:
        return "scales without a weight"
    if _is_stored_as(FP8, weight, sizes, checkpoint):
        return FP8.name
    return checkpoint.info(weight)[0].lower()


def _is_stored_as(format_: WeightFormat, weight: str, sizes: dict[str, int], checkpoint: Checkpoint) -> bool:
    scales = all(part.suffix in sizes for part in format_.scales)
    return scales and weight in checkpoint and checkpoint.info(weight)[0] == CODES[format_.name]
