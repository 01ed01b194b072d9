"""A chunk of an update: what its tensors are, and where their bytes come from."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from n3c.backends.safetensors.checkpoint import DTYPES
from n3c.backends.safetensors.header import TensorInfo
from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError

TORCH_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "uint8": "U8",
    "int8": "I8",
    "int32": "I32",
    "int64": "I64",
}
"""PyTorch's name of an element type → that of safetensors."""
_SEGMENT = re.compile(r"[A-Za-z0-9_.-]{1,200}")
_MOST_DIMS, _MOST_ELEMENTS = 8, 1 << 48


def update_error(message: str, help: str | None = None) -> N3CError:
    """Return the error (E0855, exit code 2) about an update that is not as it must be."""
    return N3CError(Diagnostic("E0855", f"weight update: {message}", help=help), ExitCode.USAGE)


@dataclass(frozen=True, slots=True)
class Described:
    """A tensor that is to come."""

    name: str
    dtype: str
    """safetensors' name of the element type."""
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size."""
        return TensorInfo(self.dtype, self.shape, 0).bytes


def described(names: object, dtypes: object, shapes: object) -> tuple[Described, ...]:
    """Return the tensors of parallel lists, element types by PyTorch's or safetensors' names; N3CError (E0855)."""
    lists = [value for value in (names, dtypes, shapes) if isinstance(value, Sequence) and not isinstance(value, str)]
    if len(lists) < 3 or len({len(each) for each in lists}) > 1:
        raise update_error("`names`, `dtype_names` and `shapes` are to be lists of one length")
    return tuple(_described(*each) for each in zip(*lists, strict=True))


def _described(name: object, dtype: object, shape: object) -> Described:
    if not isinstance(name, str) or not 0 < len(name) <= 400:
        raise update_error(f"{name!r} is no name of a tensor")
    found = TORCH_NAMES.get(str(dtype).removeprefix("torch."), str(dtype))
    if found not in DTYPES:
        raise update_error(f"tensor `{name}`: no element type {dtype!r}", f"there are {', '.join(TORCH_NAMES)}")
    if not (
        isinstance(shape, Sequence)
        and len(shape) <= _MOST_DIMS
        and all(isinstance(dim, int) and not isinstance(dim, bool) and dim >= 0 for dim in shape)
        and prod(shape) <= _MOST_ELEMENTS
    ):
        raise update_error(f"tensor `{name}`: {shape!r} is no shape")
    return Described(name, found, tuple(shape))


Data = Iterable[tuple[Described, NDArray[np.uint8]]]
"""Tensors with their bytes."""


def of_tensors(tensors: Mapping[str, Any]) -> Iterator[tuple[Described, NDArray[np.uint8]]]:
    """Yield tensors of this process, of PyTorch on any device or of numpy, by their names."""
    for name, tensor in tensors.items():
        if isinstance(tensor, np.ndarray):
            array: NDArray[Any] = np.ascontiguousarray(tensor)
            yield _described(name, _numpy_name(array), array.shape), array.reshape(-1).view(np.uint8)
        else:
            host = tensor.detach().cpu().contiguous()
            yield _described(name, str(host.dtype), tuple(host.shape)), _bytes_of(host)


def _numpy_name(array: NDArray[Any]) -> str:
    return next((name for name, dtype in DTYPES.items() if dtype == array.dtype), str(array.dtype))


def _bytes_of(tensor: Any) -> NDArray[np.uint8]:
    import torch

    flat: NDArray[np.uint8] = tensor.reshape(-1).view(torch.uint8).numpy()
    return flat


def of_shared_memory(segment: object, tensors: Sequence[Described]) -> Iterator[tuple[Described, NDArray[np.uint8]]]:
    """Yield tensors that another process has put into shared memory, one behind the other without gaps.

    `segment` is the name that `multiprocessing.shared_memory` gave it. It is read, and left to the other process.
    """
    if not isinstance(segment, str) or not _SEGMENT.fullmatch(segment):
        raise update_error(f"{segment!r} is no name of shared memory")
    try:
        memory = _opened(segment)
    except (OSError, ValueError) as error:
        raise update_error(f"no shared memory {segment!r}: {error}") from error
    try:
        if sum(each.bytes for each in tensors) > memory.size:
            raise update_error(f"{segment!r} has {memory.size:,} bytes, fewer than its tensors")
        start = 0
        for each in tensors:
            assert memory.buf is not None
            yield each, np.frombuffer(memory.buf, np.uint8, each.bytes, start).copy()
            start += each.bytes
    finally:
        memory.close()


def _opened(segment: str) -> SharedMemory:
    """Open shared memory without taking responsibility for it: else the end of this process would remove it."""
    if sys.version_info >= (3, 13):
        return SharedMemory(segment, track=False)
    with _OPENING:
        register = resource_tracker.register
        resource_tracker.register = lambda *_: None
        try:
            return SharedMemory(segment)
        finally:
            resource_tracker.register = register


_OPENING = threading.Lock()
