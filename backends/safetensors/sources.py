"""Evaluating source expressions: parameters of a program from tensors of a checkpoint, one at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from n3c.ir.formats import E4M3_MAX, FP8, NVFP4
from n3c.ir.ops import CACHE_MAX
from n3c.ir.program import Parameter
from n3c.ir.source import (
    Bytes,
    CacheScale,
    Concat,
    Dequantized,
    Fp8,
    InputScale,
    NegExp,
    Nvfp4,
    Rounded,
    Source,
    Stack,
    Tensor,
    tensor_names,
)
from n3c.ir.types import DType

from . import nvfp4
from .checkpoint import DTYPES, Checkpoint, file_error
from .header import ELEMENT_NAMES
from .packing import NotFiniteError, fp8_scale, largest, pack_fp8_rows

Array = NDArray[np.generic]

NUMPY_DTYPES = {dtype: DTYPES[name] for dtype, name in ELEMENT_NAMES.items()}
"""Stored types in numpy; FP4 codes are bytes of two."""


def load(parameter: Parameter, checkpoint: Checkpoint) -> Array:
    """Return the value of `parameter` in its stored type; FP4 codes as uint8 [..., K/2].

    Raises N3CError where a tensor is missing, misshapen or not finite.
    """
    value = _evaluate(parameter.source, checkpoint).astype(NUMPY_DTYPES[parameter.type.dtype], copy=False)
    shape = parameter.type.static_dims
    if parameter.type.dtype is DType.F4E2M1:
        shape = (*shape[:-1], shape[-1] // 2)
    if value.shape != shape:
        wrong = ", ".join(tensor_names(parameter.source))
        raise file_error(
            "E0606",
            f"`{parameter.name}` needs {list(shape)}, but {wrong} gives {list(value.shape)}",
            checkpoint.directory,
        )
    return value


def _evaluate(source: Source, checkpoint: Checkpoint) -> Array:
    match source:
        case Tensor(name):
            return checkpoint.read(name)
        case Stack():
            return np.stack([checkpoint.read(name) for name in tensor_names(source)])
        case Concat(parts):
            return np.concatenate([_evaluate(part, checkpoint) for part in parts])
        case NegExp(operand):
            return -np.exp(_evaluate(operand, checkpoint).astype(np.float32))
        case Bytes(operand):
            return _evaluate(operand, checkpoint).view(np.int8)
        case Nvfp4(operand, part, block_rows):
            return _each_matrix(operand, checkpoint, lambda name: _nvfp4(checkpoint, name, part, block_rows))
        case Fp8(operand, part):
            return _each_matrix(operand, checkpoint, lambda name: _fp8(checkpoint, name, part))
        case Rounded(operand):
            return _evaluate(operand, checkpoint).astype(ml_dtypes.bfloat16).astype(np.float32)
        case CacheScale(name):
            if name not in checkpoint:
                return np.asarray(1, np.float32)
            return (checkpoint.read(name).astype(np.float32) * np.float32(E4M3_MAX / CACHE_MAX)).reshape(())
        case InputScale():
            stored = [checkpoint.read(name).reshape(()) for name in source.names if name in checkpoint]
            return np.asarray(max(stored, default=1), np.float32)
        case Dequantized(Nvfp4() as codes):
            rows = codes.block_rows
            return _each_matrix(codes.operand, checkpoint, lambda name: _dequantized_nvfp4(checkpoint, name, rows))
        case Dequantized(codes):
            return _each_matrix(codes.operand, checkpoint, lambda name: _dequantized_fp8(checkpoint, name))


def _each_matrix(source: Source, checkpoint: Checkpoint, part: Callable[[str], Array]) -> Array:
    """Quantize matrix by matrix: every expert has scales of its own, and only one is held unquantized."""
    pieces = [part(name) for name in tensor_names(source)]
    return np.stack(pieces) if isinstance(source, Stack) else pieces[0]


def _nvfp4(checkpoint: Checkpoint, name: str, part: str, block_rows: int) -> Array:
    stored = NVFP4.part_names(name)
    if stored["scale_2"] in checkpoint:
        return checkpoint.read(stored[part])
    return nvfp4_parts(name, checkpoint.read(name), block_rows, checkpoint.directory)[stored[part]]


def nvfp4_parts(name: str, weight: Array, block_rows: int, place: Path) -> dict[str, Array]:
    """Return the tensors in which NVFP4 stores the matrix `name`, by their names; N3CError for one that it cannot.

    `place` is what the error names.
    """
    try:
        matrix = nvfp4.quantize(weight, block_rows)
    except ValueError as error:
        raise file_error("E0607", f"tensor `{name}`: {error}", place) from error
    return {stored: np.asarray(getattr(matrix, part)) for part, stored in NVFP4.part_names(name).items()}


def _fp8(checkpoint: Checkpoint, name: str, part: str) -> Array:
    stored = FP8.part_names(name)
    if stored["scale"] in checkpoint:
        return checkpoint.read(stored[part])
    return fp8_parts(name, checkpoint.read(name), checkpoint.directory)[stored[part]]


def fp8_parts(name: str, weight: Array, place: Path) -> dict[str, Array]:
    """Return the tensors in which FP8 stores the matrix `name`, as `nvfp4_parts` does."""
    try:
        scale = fp8_scale(largest(weight))
    except NotFiniteError as error:
        message = f"tensor `{name}`: the weight holds NaN or infinity ({error.value} at {list(error.index)})"
        raise file_error("E0607", message, place) from error
    parts = {"codes": pack_fp8_rows(weight, scale).codes.view(ml_dtypes.float8_e4m3fn), "scale": np.asarray(scale)}
    return {stored: parts[part] for part, stored in FP8.part_names(name).items()}


def _dequantized_nvfp4(checkpoint: Checkpoint, name: str, block_rows: int) -> Array:
    codes, scale, scale_2 = (_nvfp4(checkpoint, name, part, block_rows) for part in ("codes", "scale", "scale_2"))
    return nvfp4.dequantize(nvfp4.Nvfp4Matrix(codes.view(np.uint8), scale, np.float32(scale_2.reshape(()))))


def _dequantized_fp8(checkpoint: Checkpoint, name: str) -> Array:
    return _fp8(checkpoint, name, "codes").astype(np.float32) * _fp8(checkpoint, name, "scale").astype(np.float32)
