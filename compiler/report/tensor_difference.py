"""Two checkpoints compared: the weights that one of them lacks, other shapes and formats, and how far values differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from n3c.backends.progress import Progress
from n3c.backends.safetensors.checkpoint import Checkpoint
from n3c.backends.safetensors.inventory import weight_formats
from n3c.backends.safetensors.values import Stored, bands


@dataclass(frozen=True, slots=True)
class Values:
    """How far the values of a weight differ from those of another; all sums in float64."""

    relative_error: float
    """Σ (b − a)² / Σ a²; 0 where both are 0."""
    largest: float
    """Largest |b − a|."""
    rms_a: float
    """Root mean square of the values."""
    rms_b: float

    def as_json(self) -> dict[str, Any]:
        """Return the form of `diff --json`."""
        return {
            "relative_error": self.relative_error,
            "largest": self.largest,
            "rms_a": self.rms_a,
            "rms_b": self.rms_b,
        }


@dataclass(frozen=True, slots=True)
class WeightDifference:
    """A weight that both checkpoints have, and not alike."""

    name: str
    format_a: str
    format_b: str
    shape_a: tuple[int, ...]
    shape_b: tuple[int, ...]
    values: Values | None
    """None for other shapes, and for values that n3c does not read or was not asked for."""

    def as_json(self) -> dict[str, Any]:
        """Return one entry of `diff --json`, key `tensors.changed`."""
        return {
            "name": self.name,
            "format": [self.format_a, self.format_b],
            "shape": [list(self.shape_a), list(self.shape_b)],
            "values": None if self.values is None else self.values.as_json(),
        }


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """What two checkpoints do not share."""

    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    changed: tuple[WeightDifference, ...]
    equal: int
    """Weights that are stored alike, to the bit where values were compared."""

    def as_json(self) -> dict[str, Any]:
        """Return the form of `diff --json`, key `tensors`."""
        return {
            "only_a": list(self.only_a),
            "only_b": list(self.only_b),
            "changed": [weight.as_json() for weight in self.changed],
            "equal": self.equal,
        }

    def __bool__(self) -> bool:
        """Whether there is any difference."""
        return bool(self.only_a or self.only_b or self.changed)


def compare_tensors(a: Checkpoint, b: Checkpoint, progress: Progress, *, headers_only: bool) -> TensorDifference:
    """Compare the weights of two checkpoints by their released names."""
    formats_a, formats_b = weight_formats(a), weight_formats(b)
    shared = [name for name in formats_a if name in formats_b]
    progress.phase("compare weights")
    changed: list[WeightDifference] = []
    for done, name in enumerate(shared):
        progress.step(name, done, len(shared))
        found = _compare(Stored(a, name, formats_a[name]), Stored(b, name, formats_b[name]), headers_only)
        if found is not None:
            changed.append(found)
    return TensorDifference(
        tuple(name for name in formats_a if name not in formats_b),
        tuple(name for name in formats_b if name not in formats_a),
        tuple(changed),
        len(shared) - len(changed),
    )


def _compare(a: Stored, b: Stored, headers_only: bool) -> WeightDifference | None:
    """Return how two weights differ; None where they are stored alike."""
    if not (a.readable and b.readable):
        return WeightDifference(a.name, a.format, b.format, (), (), None) if a.format != b.format else None
    alike = (a.format, a.shape) == (b.format, b.shape)
    if headers_only or a.shape != b.shape:
        return None if alike else WeightDifference(a.name, a.format, b.format, a.shape, b.shape, None)
    values = compare_values(a, b)
    if alike and values.largest == 0:
        return None
    return WeightDifference(a.name, a.format, b.format, a.shape, b.shape, values)


def compare_values(a: Stored, b: Stored) -> Values:
    """Compare the values of two weights of one shape."""
    noise = signal_a = signal_b = largest = 0.0
    count = 0
    for first, last in bands(a.shape):
        x, y = a.rows(first, last).astype(np.float64), b.rows(first, last).astype(np.float64)
        error = y - x
        noise += float((error**2).sum())
        signal_a += float((x**2).sum())
        signal_b += float((y**2).sum())
        largest = max(largest, float(np.abs(error).max(initial=0)))
        count += x.size
    mean = max(1, count)
    return Values(
        noise / signal_a if signal_a else float(noise > 0), largest, (signal_a / mean) ** 0.5, (signal_b / mean) ** 0.5
    )
