"""The header of a safetensors file, read and written with nothing taken on trust.

    8 bytes: length n of the header, little endian | n bytes of JSON | data

The JSON maps a tensor's name to `dtype`, `shape` and `data_offsets` [begin, end) in the data. A reader
that believes it can be made to read anything, so: names are given once, sizes follow from type and
shape, and the tensors cover the data from its first byte to its last without gap or overlap
(the rules of the format: github.com/huggingface/safetensors, README).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard, cast

from n3c.ir.formats import FORMATS
from n3c.ir.json_file import LFS_POINTER, JsonError, is_count, is_lfs_pointer, parse_json
from n3c.ir.types import DType, TensorType

MAX_HEADER_BYTES = 100_000_000
"""The limit of the format's own library."""

BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16,
    "U16": 16, "F8_E4M3": 8, "F8_E4M3FNUZ": 8, "F8_E5M2": 8, "F8_E5M2FNUZ": 8, "F8_E8M0": 8, "U8": 8, "I8": 8,
    "BOOL": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
"""Bits of an element: every type of safetensors 0.8."""

ELEMENT_NAMES = {
    DType.F32: "F32", DType.F16: "F16", DType.BF16: "BF16", DType.F8E4M3: "F8_E4M3", DType.F4E2M1: "U8",
    DType.I64: "I64", DType.I8: "I8",
}  # fmt: skip
"""Element type → its name in a file; packed FP4 codes are bytes."""

CODES = {format_.name: ELEMENT_NAMES[format_.codes.dtype] for format_ in FORMATS.values()}
"""Format of a weight → name of the element type of its codes."""

MAX_DIM = 1 << 40


def stored_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Return the bytes of a tensor in a file; HeaderError where its elements end within one."""
    bits = math.prod(shape) * BITS[dtype]
    if bits % 8:
        raise HeaderError(f"{list(shape)} elements of {dtype} end within a byte")
    return bits // 8


def stored_as(type_: TensorType) -> tuple[str, tuple[int, ...]]:
    """Return the element type and the shape with which a tensor is stored; FP4 codes are bytes of two."""
    shape = type_.static_dims
    if type_.dtype is DType.F4E2M1:
        shape = (*shape[:-1], shape[-1] // 2)
    return ELEMENT_NAMES[type_.dtype], shape


class HeaderError(ValueError):
    """A file that is not valid safetensors."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: its element type, its shape, and where its bytes begin in the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def bytes(self) -> int:
        """Return its size in the file."""
        return stored_bytes(self.dtype, self.shape)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return the tensors of a file in the order of their data; HeaderError, or OSError where it cannot be read."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64)
        if is_lfs_pointer(start):
            raise HeaderError(f"it is {LFS_POINTER}")
        if len(start) < 8:
            raise HeaderError("it ends within its first 8 bytes")
        file.seek(8)
        start = start[:8]
        length = int.from_bytes(start, "little")
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise HeaderError(f"it promises a header of {length} bytes; the file has {size}")
        text = file.read(length)
    return _tensors(_parse(text), 8 + length, size)


def _parse(text: bytes) -> dict[str, object]:
    try:
        data = parse_json(text)
    except JsonError as error:
        raise HeaderError(f"its header cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise HeaderError("its header is not a JSON object")
    return cast("dict[str, object]", data)


def _tensors(header: Mapping[str, object], data: int, size: int) -> dict[str, TensorInfo]:
    spans: list[tuple[int, int, str]] = []
    tensors: dict[str, TensorInfo] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if not _is_entry(entry):
            raise HeaderError(f"its header says of `{name[:200]}` what is no type, shape and offsets")
        begin, end = entry["data_offsets"]
        tensors[name] = info = TensorInfo(entry["dtype"], tuple(entry["shape"]), data + begin)
        if begin < 0 or info.bytes != end - begin:
            raise HeaderError(f"`{name[:200]}` needs {info.bytes} bytes, its offsets are {begin} to {end}")
        spans.append((begin, end, name))
    at = 0
    spans.sort()
    for begin, end, name in spans:
        if begin != at:
            raise HeaderError(f"`{name[:200]}` begins at {begin}, but the tensor before it ends at {at}")
        at = end
    if data + at != size:
        raise HeaderError(f"its tensors end at byte {data + at}, the file at {size}")
    return {name: tensors[name] for _, _, name in spans}


def _is_entry(entry: object) -> TypeGuard[dict[str, Any]]:
    if not isinstance(entry, dict):
        return False
    table = cast("dict[str, object]", entry)
    dtype, offsets = table.get("dtype"), table.get("data_offsets")
    return (
        isinstance(dtype, str)
        and dtype in BITS
        and _is_sizes(table.get("shape"))
        and _is_sizes(offsets)
        and len(cast("list[int]", offsets)) == 2
    )


def _is_sizes(value: object) -> bool:
    return isinstance(value, list) and all(is_count(size, MAX_DIM) for size in cast("list[object]", value))


def header_bytes(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """Return the first bytes of a file with these tensors, name → (type, shape), data in this order.

    The header is padded with blanks, so that data begins at a multiple of 8.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape) in tensors.items():
        end = at + stored_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
