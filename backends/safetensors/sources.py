"""Evaluating source expressions: parameters of a program from tensors of a checkpoint, one at a time."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

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
FLOATS = ("F64", "F32", "F16", "BF16")
"""Element types of weights that are not quantized yet."""

NUMPY_DTYPES = {dtype: DTYPES[name] for dtype, name in ELEMENT_NAMES.items()}
"""Stored types in numpy; FP4 codes are bytes of two."""


def load(parameter: Parameter, checkpoint: Checkpoint) -> Array:
    """Return the value of `parameter` in its stored type; FP4 codes as uint8 [..., K/2].

    Raises N3CError where a tensor is missing, misshapen or not finite.
    """
    value = _evaluate(parameter.source, checkpoint).astype(NUMPY_DTYPES[parameter.type.dtype], copy=False)
    shape = parameter.type.static_dims
    if isinstance(parameter.source, Bytes) and value.shape == (*shape[:-2], prod(shape[-2:])):
        value = value.reshape(shape)  # by blocks
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
        case Nvfp4() | Fp8():
            return _each_matrix(source.operand, checkpoint, lambda name: _part(source, name, source.part, checkpoint))
        case Rounded(operand):
            return _evaluate(operand, checkpoint).astype(ml_dtypes.bfloat16).astype(np.float32)
        case CacheScale(name):
            if name not in checkpoint:
                return np.asarray(1, np.float32)
            return (checkpoint.read(name).astype(np.float32) * np.float32(E4M3_MAX / CACHE_MAX)).reshape(())
        case InputScale():
            stored = [checkpoint.read(name).reshape(()) for name in source.names if name in checkpoint]
            return np.asarray(max(stored, default=1), np.float32)
        case Dequantized(codes):
            return _each_matrix(codes.operand, checkpoint, lambda name: _dequantized(codes, name, checkpoint))


def _each_matrix(source: Source, checkpoint: Checkpoint, part: Callable[[str], Array]) -> Array:
    """Quantize matrix by matrix: every expert has scales of its own, and only one is held unquantized."""
    pieces = [part(name) for name in tensor_names(source)]
    return np.stack(pieces) if isinstance(source, Stack) else pieces[0]


def _part(source: Nvfp4 | Fp8, name: str, part: str, checkpoint: Checkpoint) -> Array:
    """Return a part of a matrix as the checkpoint stores it, or as it is quantized on the way."""
    stored = _names(source, name)
    if stored["scale_2" if isinstance(source, Nvfp4) else "scale"] in checkpoint:
        return checkpoint.read(stored[part])
    return quantized_parts(source, name, checkpoint)[stored[part]]


def _names(source: Nvfp4 | Fp8, name: str) -> dict[str, str]:
    return (NVFP4 if isinstance(source, Nvfp4) else FP8).part_names(name)


def quantized_parts(source: Nvfp4 | Fp8, name: str, checkpoint: Checkpoint) -> dict[str, Array]:
    """Return the tensors in which the format of `source` stores its matrix `name`, by their names, as `n3c quantize`.

    N3CError (E0607, exit code 6) for a matrix that it cannot store, or beside one that has its scale and is not finite.
    """
    weight, stored = checkpoint.read(name), _names(source, name)
    together = [each for each in source.scaled_with if checkpoint.info(each)[0] in FLOATS]
    amax = max((_largest(each, checkpoint) for each in together), default=None)
    if isinstance(source, Fp8):
        scale = fp8_scale(_largest(name, checkpoint) if amax is None else amax)
        codes = pack_fp8_rows(weight, scale).codes.view(ml_dtypes.float8_e4m3fn)
        return {stored["codes"]: codes, stored["scale"]: np.asarray(scale)}
    try:
        matrix = nvfp4.quantize(weight, source.block_rows, amax)
    except ValueError as error:
        raise file_error("E0607", f"tensor `{name}`: {error}", checkpoint.directory) from error
    return {stored[part]: np.asarray(getattr(matrix, part)) for part in stored}


def _largest(name: str, checkpoint: Checkpoint) -> np.float32:
    try:
        return largest(checkpoint.read(name))
    except NotFiniteError as error:
        message = f"tensor `{name}`: the weight holds NaN or infinity ({error.value} at {list(error.index)})"
        raise file_error("E0607", message, checkpoint.directory) from error


def _dequantized(source: Nvfp4 | Fp8, name: str, checkpoint: Checkpoint) -> Array:
    parts = {part: _part(source, name, part, checkpoint) for part in _names(source, name)}
    if isinstance(source, Fp8):
        return parts["codes"].astype(np.float32) * parts["scale"].astype(np.float32)
    scale_2 = np.float32(parts["scale_2"].reshape(()))
    return nvfp4.dequantize(nvfp4.Nvfp4Matrix(parts["codes"].view(np.uint8), parts["scale"], scale_2))
