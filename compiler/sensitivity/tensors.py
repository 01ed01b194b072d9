"""Checkpoint tensors as float32 PyTorch tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from n3c.backends.safetensors.checkpoint import Checkpoint, file_error

if TYPE_CHECKING:
    from torch import Tensor

_FLOATS = ("F32", "BF16", "F16", "F64")


def read_float(checkpoint: Checkpoint, name: str) -> Tensor:
    """Return one tensor as float32; N3CError (exit code 6) where it is missing or already quantized."""
    import torch

    kind = checkpoint.info(name)[0]
    if kind not in _FLOATS:
        message = f"tensor `{name}` is {kind}: sensitivity and calibration need the weights before quantization"
        raise file_error("E0605", message, checkpoint.directory)
    return torch.from_numpy(np.array(checkpoint.read(name), dtype=np.float32))
