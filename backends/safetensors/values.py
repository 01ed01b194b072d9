"""The values of weights as they are stored, whatever their format: read in bands, so that memory is bounded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from n3c.ir.formats import FORMATS

from .checkpoint import DTYPES, Checkpoint
from .nvfp4 import Nvfp4Matrix, dequantize

BAND = 1 << 22
"""Values of a band, about; a row is never cut."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A weight of a checkpoint, with the format that its tensors have."""

    checkpoint: Checkpoint
    name: str
    format: str
    """A format of [quantization], or safetensors' element type in small letters."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of its values."""
        shape = self.checkpoint.info(self.name)[1]
        return (*shape[:-1], shape[-1] * 2) if self._blocked else shape

    @property
    def readable(self) -> bool:
        """Whether n3c knows its values: those of ModelOpt's layout, and of the element types that it reads."""
        if self.name not in self.checkpoint:
            return False
        return self.format in FORMATS or self.checkpoint.info(self.name)[0] in DTYPES

    @property
    def _blocked(self) -> bool:
        return self.format in FORMATS and FORMATS[self.format].blocked

    def rows(self, first: int, last: int) -> NDArray[np.float32]:
        """Return the values of rows `first` to below `last`, float32; of a scalar its one value."""
        if not self.shape:
            return np.atleast_1d(self.checkpoint.read(self.name).astype(np.float32))
        stored = self.checkpoint.read_rows(self.name, first, last)
        if self.format not in FORMATS or not FORMATS[self.format].quantized:
            return stored.astype(np.float32)
        scales = {
            part.name: self.checkpoint.read(self.name + part.suffix)
            if part.name != "scale" or not self._blocked
            else self.checkpoint.read_rows(self.name + part.suffix, first, last)
            for part in FORMATS[self.format].scales
        }
        if self._blocked:
            matrix = Nvfp4Matrix(stored.view(np.uint8), scales["scale"], np.float32(scales["scale_2"].item()))
            return dequantize(matrix)
        return stored.astype(np.float32) * np.float32(scales["scale"].item())


def bands(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yield the rows of a weight in bands: first and last, the last not included."""
    count = shape[0] if shape else 1
    row = max(1, int(np.prod(shape[1:], dtype=np.int64)))
    step = max(1, BAND // row)
    for first in range(0, count, step):
        yield first, min(first + step, count)
