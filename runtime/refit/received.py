"""Tensors that come one after the other, as a checkpoint: what the spec quantizes is quantized on arrival."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from n3c.backends.safetensors.checkpoint import DTYPES, Checkpoint, file_error
from n3c.backends.safetensors.checkpoint_fit import require_fit
from n3c.backends.safetensors.header import TensorInfo
from n3c.backends.safetensors.sources import FLOATS, quantized_parts
from n3c.backends.safetensors.tensor_names import AmbiguousError, released_tensors
from n3c.ir.diagnostics import N3CError
from n3c.ir.source import Fp8, Nvfp4, tensor_names
from n3c.passes.lower.model import lower
from n3c.passes.pipelines import quantize_pass
from n3c.specs.schema import Spec

PLACE = Path("pushed weights")
"""What diagnostics name in place of a folder."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class ReceivedCheckpoint(Checkpoint):
    """Tensors in memory, by their released names. Of a weight that the spec quantizes codes and scales are kept."""

    def __init__(self, spec: Spec) -> None:
        self.directory = PLACE
        self._spec = spec
        self._tensors: dict[str, NDArray[Any]] = {}
        program = lower(spec)
        quantize_pass(spec).run(program)
        self._formats = {
            name: parameter.source
            for parameter in program.parameters.values()
            if isinstance(parameter.source, (Nvfp4, Fp8)) and parameter.source.part == "codes"
            for name in tensor_names(parameter.source)
        }

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def receive(self, name: str, dtype: str, shape: tuple[int, ...], data: NDArray[np.uint8]) -> None:
        """Take in a tensor: safetensors' name of its element type, its shape, its bytes.

        Names are those of checkpoints or of a model in memory, where experts are one tensor. N3CError: E0605 for an
        element type that is not read, E0606 for bytes that are not so many, E0607 for a weight that cannot be
        quantized, E0609 for a tensor that came before, E0620 for experts that tell no rows from columns.
        """
        if dtype not in DTYPES:
            raise file_error("E0605", f"tensor `{name}` has the element type {dtype}, which n3c does not read", PLACE)
        info = TensorInfo(dtype, shape, 0)
        if data.nbytes != info.bytes:
            message = f"tensor `{name}` of {list(shape)} has {info.bytes:,} bytes, and {data.nbytes:,} came"
            raise file_error("E0606", message, PLACE)
        try:
            parts = list(released_tensors({name: info}))
        except AmbiguousError as error:
            raise file_error("E0620", str(error), PLACE) from error
        for released, part in parts:
            if released in self._tensors:
                raise file_error("E0609", f"tensor `{released}` came twice", PLACE)
            raw = data[part.offset : part.offset + part.bytes]
            self._tensors[released] = raw.view(DTYPES[dtype]).reshape(part.shape).copy()
            self._quantize(released)

    def complete(self) -> None:
        """Raise N3CError (exit code 6) with all that is missing or does not fit the spec."""
        require_fit(self._spec, self)

    def _quantize(self, name: str) -> None:
        """Quantize a weight that came, when all have come that have its scale."""
        source = self._formats.get(name)
        together = (source.scaled_with if source is not None else ()) or (name,)
        if source is None or not all(each in self._tensors for each in together):
            return
        whole = [each for each in together if self._tensors[each].ndim == 2 and self.info(each)[0] in FLOATS]
        try:
            parts = [quantized_parts(self._formats[each], each, self) for each in whole]
        except N3CError:
            for each in whole:
                del self._tensors[each]
            raise
        for stored in parts:
            self._tensors |= stored

    def info(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Return safetensors' name of the element type, and the shape."""
        tensor = self.read(name)
        return _NAMES[tensor.dtype], tensor.shape

    def bytes(self, name: str) -> int:
        """Return the size of a tensor."""
        return self.read(name).nbytes

    def file(self, name: str) -> Path:
        """Return what diagnostics name."""
        self.read(name)
        return PLACE

    def read(self, name: str) -> NDArray[Any]:
        """Return one tensor."""
        if name not in self._tensors:
            raise file_error("E0603", f"no tensor `{name}` in what was pushed", PLACE)
        return self._tensors[name]

    def read_rows(self, name: str, first: int, last: int) -> NDArray[Any]:
        """Return rows `first` to below `last` of a tensor [N, …]."""
        rows: NDArray[Any] = self.read(name)[first:last]
        return rows

    def read_bytes(self, name: str, start: int, length: int) -> NDArray[np.uint8]:
        """Return bytes of a tensor."""
        return np.ascontiguousarray(self.read(name)).reshape(-1).view(np.uint8)[start : start + length]
