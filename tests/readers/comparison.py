"""What n3c itself makes of a checkpoint that it wrote, and how a reader's values differ from that."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from n3c.backends.safetensors import nvfp4
from n3c.backends.safetensors.checkpoint import Checkpoint

SCALES_OF_WEIGHTS = (".weight_scale", ".weight_scale_2")
Values = dict[str, NDArray[np.float32]]


def decoded(folder: Path) -> tuple[Values, dict[str, str]]:
    """Return every tensor of a checkpoint in float32, weights dequantized, and ModelOpt's algorithm by linear."""
    checkpoint = Checkpoint(folder)
    values: Values = {}
    formats: dict[str, str] = {}
    for name in checkpoint:
        if name.endswith(SCALES_OF_WEIGHTS):
            continue
        stored, module = checkpoint.read(name), name.removesuffix(".weight")
        if f"{name}_scale_2" in checkpoint:
            scale, scale_2 = checkpoint.read(f"{name}_scale"), checkpoint.read(f"{name}_scale_2")
            stored = nvfp4.dequantize(nvfp4.Nvfp4Matrix(stored.view(np.uint8), scale, np.float32(scale_2.reshape(()))))
            formats[module] = "NVFP4" if f"{module}.input_scale" in checkpoint else "W4A16_NVFP4"
        elif f"{name}_scale" in checkpoint:
            stored = stored.astype(np.float32) * checkpoint.read(f"{name}_scale").astype(np.float32)
            formats[module] = "FP8"
        values[name] = stored.astype(np.float32)
    return values, formats


@dataclass
class Difference:
    """How a reader's values differ from n3c's."""

    version: str
    refused: str = ""
    unread: list[str] = field(default_factory=list[str])
    """Tensors for which the reader has no place, or a place that it did not fill."""
    wrong: dict[str, float] = field(default_factory=dict[str, float])
    """Tensors whose values differ by more than is allowed → the largest difference."""
    formats: dict[str, tuple[str | None, str | None]] = field(default_factory=dict[str, tuple[str | None, str | None]])
    """Linears that the reader runs in another algorithm than they are stored for → stored, run."""
    unusable: dict[str, str] = field(default_factory=dict[str, str])
    """Modules that are loaded and cannot be exported → the reader's message."""
    compared: int = 0
    kv_cache: str | None = None

    @property
    def clean(self) -> bool:
        """Whether the reader holds every tensor, with n3c's values, and runs each linear as it is stored."""
        return not (self.refused or self.unread or self.wrong or self.formats or self.unusable)


def compare(checkpoint: Path, read: Path, tolerance: float) -> Difference:
    """Return how what a reader wrote to `read` differs; `tolerance` is relative to each value, plus 1e-7."""
    said: dict[str, Any] = json.loads((read / "reading.json").read_text(encoding="utf-8"))
    found = Difference(said["version"], said.get("refused", ""))
    if found.refused:
        return found
    found.unusable, found.kv_cache = said["unusable"], said["kv_cache"]
    expected, formats = decoded(checkpoint)
    theirs = load_file(read / "values.safetensors")
    for name, value in expected.items():
        held = theirs.get(name)
        if held is None or np.isnan(held).any():
            found.unread.append(name)
            continue
        difference = np.abs(held.reshape(value.shape) - value)
        if (difference > tolerance * np.abs(value) + 1e-7).any():
            found.wrong[name] = float(difference.max())
        found.compared += 1
    for module in sorted(formats.keys() | said["formats"].keys()):
        stored, run = formats.get(module), said["formats"].get(module)
        if stored != run:
            found.formats[module] = (stored, run)
    return found
