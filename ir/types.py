"""Types of IR values: an element type and dims, each an integer or a named symbol (`B`, `S`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from math import prod
from typing import cast

Dim = int | str


class DType(Enum):
    """Element types; the value is the name in the text form."""

    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    F8E4M3 = "f8e4m3"
    """OCP FP8 E4M3 (float8_e4m3fn): no infinities."""
    F4E2M1 = "f4e2m1"
    """OCP FP4 E2M1: 0, .5, 1, 1.5, 2, 3, 4, 6 and their negatives; two elements a byte, the first in the low nibble."""
    I64 = "i64"
    I8 = "i8"

    @property
    def bits(self) -> int:
        """Bits of one element."""
        return _BITS[self]


_BITS = {
    DType.F32: 32,
    DType.F16: 16,
    DType.BF16: 16,
    DType.F8E4M3: 8,
    DType.F4E2M1: 4,
    DType.I64: 64,
    DType.I8: 8,
}


@dataclass(frozen=True, slots=True)
class TensorType:
    """The type of a tensor value."""

    dtype: DType
    dims: tuple[Dim, ...]

    def __str__(self) -> str:
        return f"{self.dtype.value}[{', '.join(map(str, self.dims))}]"

    def with_last(self, last: Dim) -> TensorType:
        """Return the same type with another last dim."""
        return TensorType(self.dtype, (*self.dims[:-1], last))

    def with_dtype(self, dtype: DType) -> TensorType:
        """Return the same dims with another element type."""
        return TensorType(dtype, self.dims)

    def bind(self, dims: Mapping[str, int]) -> TensorType:
        """Return the type with the named dims of `dims` replaced by their sizes."""
        return TensorType(self.dtype, tuple(dims.get(d, d) if isinstance(d, str) else d for d in self.dims))

    @property
    def elements(self) -> int:
        """Number of elements; ValueError where a dim is symbolic."""
        return prod(self.static_dims)

    @property
    def static_dims(self) -> tuple[int, ...]:
        """The dims as integers; ValueError where one is symbolic."""
        for dim in self.dims:
            if isinstance(dim, str):
                raise ValueError(f"{self} has symbolic dims")
        return cast("tuple[int, ...]", self.dims)

    @property
    def bytes(self) -> int:
        """Size in bytes, packed; ValueError where a dim is symbolic."""
        return (self.elements * self.dtype.bits + 7) // 8
