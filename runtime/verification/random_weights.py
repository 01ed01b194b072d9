"""Random weights in place of a checkpoint: tensors of its names, shapes and types, from a seed."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from n3c.backends.safetensors.checkpoint import Checkpoint
from n3c.ir.formats import INPUT_SCALE
from n3c.ir.program import Parameter, Program
from n3c.ir.source import Stack, tensor_names
from n3c.ir.types import DType
from n3c.passes.quantize import linear_parameters

INPUT = 1 / 64
"""The `input_scale` of every linear: FP8 reaches 7, and blocks of NVFP4 from 0.0015 to 42 have a normal E4M3 scale."""


class RandomCheckpoint(Checkpoint):
    """Tensors of a lowered program, made when they are read; every one depends on its name and the seed only.

    Activations keep their size through any number of layers, and nothing is left at zero or one: a tensor that
    is read wrongly shows.
    """

    def __init__(self, program: Program, seed: int) -> None:
        self.directory = Path(f"random weights (seed {seed})")
        self._seed = seed
        self._parameters = {name: p for p in program.parameters.values() for name in tensor_names(p.source)}
        linears = linear_parameters(program)
        self._scales = {
            name.removesuffix(".weight") + INPUT_SCALE
            for name, parameter in self._parameters.items()
            if parameter.name in linears
        }

    def __contains__(self, name: object) -> bool:
        return name in self._parameters or name in self._scales

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def info(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Return the element type and the shape."""
        parameter = self._parameters[name]
        shape = parameter.type.static_dims[1 if isinstance(parameter.source, Stack) else 0 :]
        return ("BF16" if parameter.type.dtype is DType.BF16 else "F32"), shape

    def read(self, name: str) -> NDArray[np.generic]:
        """Make one tensor."""
        if name in self._scales:
            return np.asarray(INPUT, np.float32)
        dtype, shape = self.info(name)
        generator = np.random.default_rng((self._seed, zlib.crc32(name.encode())))
        values = _values(self._parameters[name], shape, generator).astype(np.float32)
        stored: NDArray[Any] = values.astype(ml_dtypes.bfloat16) if dtype == "BF16" else values
        return stored


def _values(parameter: Parameter, shape: tuple[int, ...], generator: np.random.Generator) -> NDArray[np.float64]:
    if parameter.role.endswith("norm") or parameter.name.endswith(".D"):
        return generator.uniform(0.5, 1.5, shape)
    if parameter.name.endswith(".A"):  # stored as its logarithm
        return generator.uniform(0.0, 2.0, shape)
    if len(shape) == 1:
        return generator.normal(0.0, 0.3, shape)
    return generator.normal(0.0, 0.6 / shape[-1] ** 0.5, shape)
