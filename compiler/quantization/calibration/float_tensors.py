"""Checkpoint tensors for PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from n3c.backends.safetensors.checkpoint import Checkpoint, file_error

if TYPE_CHECKING:
    from torch import Tensor

Array = NDArray[Any]

_FLOATS = ("F32", "BF16", "F16", "F64")


def read_raw(checkpoint: Checkpoint, name: str, shape: tuple[int, ...] | None = None) -> Array:
    """Return one tensor as it is stored; N3CError (exit code 6) where it is missing, misshapen or quantized."""
    kind, found = checkpoint.info(name)
    if kind not in _FLOATS:
        message = f"tensor `{name}` is {kind}: sensitivity and calibration need the weights before quantization"
        raise file_error("E0605", message, checkpoint.directory)
    if shape is not None and found != shape:
        message = f"tensor `{name}` is {list(found)}, the spec needs {list(shape)}"
        raise file_error("E0606", message, checkpoint.directory)
    return checkpoint.read(name)


def as_float(raw: Array) -> Tensor:
    """Return a tensor of NumPy's or ml_dtypes' type as float32."""
    import torch

    return torch.from_numpy(np.array(raw, dtype=np.float32))


def read_float(checkpoint: Checkpoint, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
    """Return one tensor as float32; N3CError as `read_raw`."""
    return as_float(read_raw(checkpoint, name, shape))
