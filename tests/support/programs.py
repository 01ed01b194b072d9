"""Random values for programs: checkpoint tensors, and the parameters that sources make of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from n3c.backends.safetensors.checkpoint import Checkpoint
from n3c.backends.safetensors.sources import load
from n3c.ir.program import Parameter, Program
from n3c.ir.source import Stack, tensor_names
from n3c.ir.types import DType
from n3c.runtime.engines.reference.evaluate import TORCH_DTYPES


def random_tensors(program: Program, seed: int = 0) -> dict[str, Tensor]:
    """Return every checkpoint tensor of a lowered program, in BF16 where it is stored so."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for parameter in program.parameters.values():
        shape = parameter.type.static_dims[1 if isinstance(parameter.source, Stack) else 0 :]
        dtype = torch.bfloat16 if parameter.type.dtype is DType.BF16 else torch.float32
        for name in tensor_names(parameter.source):
            tensors[name] = _value(parameter, shape, generator).to(dtype)
    return tensors


def _value(parameter: Parameter, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if parameter.role.endswith("norm") or parameter.name.endswith(".D"):
        return torch.rand(shape, generator=generator) + 0.5
    if parameter.name.endswith(".A"):
        return torch.rand(shape, generator=generator).mul(2)
    return torch.randn(shape, generator=generator) * (0.3 if len(shape) == 1 else 0.6 / shape[-1] ** 0.5)


def save_tensors(tensors: Mapping[str, Tensor], folder: Path) -> Checkpoint:
    """Write a checkpoint of one file and open it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return Checkpoint(folder)


def load_parameters(program: Program, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return the parameters of a program, as the reference evaluation takes them."""
    return {name: as_torch(load(p, checkpoint), p.type.dtype) for name, p in program.parameters.items()}


def as_torch(array: np.ndarray, dtype: DType) -> Tensor:
    """Return a numpy array, of ml_dtypes too, as a tensor of the same bytes."""
    raw = torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8).copy())
    return raw.view(TORCH_DTYPES[dtype]).reshape(array.shape)
