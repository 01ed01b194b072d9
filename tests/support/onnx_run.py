"""Run a graph in the ONNX reference evaluator, with tensors of PyTorch in and out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch import Tensor

from n3c.backends.onnx.bindings import Binding, parameter_of
from n3c.backends.onnx.emit import OnnxEntry

NUMPY_DTYPES: dict[str, Any] = {
    "f32": np.float32,
    "f16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "f8e4m3": ml_dtypes.float8_e4m3fn,
    "i64": np.int64,
    "i8": np.int8,
}


Array = npt.NDArray[Any]


def to_numpy(tensor: Tensor, binding: Binding) -> Array:
    """Return the bytes of `tensor` in the type of `binding`; FP4 codes one a byte, as numpy holds them."""
    raw = np.asarray(tensor.detach().contiguous().reshape(-1).view(torch.uint8))
    if binding.dtype == "f4e2m1":
        nibbles = np.stack((raw & 15, raw >> 4), axis=-1)
        codes: Array = nibbles.reshape(binding.shape).view(ml_dtypes.float4_e2m1fn)
        return codes
    typed: Array = raw.view(NUMPY_DTYPES[binding.dtype]).reshape(binding.shape)
    return typed


def from_numpy(array: Array) -> Tensor:
    """Return an array as a tensor: float32 for every floating-point type."""
    return torch.from_numpy(np.array(array if array.dtype == np.int64 else array.astype(np.float32)))


def in_fp8(array: Array, shape: tuple[int, ...]) -> Tensor:
    """Return the bytes of `array` as FP8 values."""
    raw = torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8).copy())
    return raw.view(torch.float8_e4m3fn).reshape(shape)


class FP4DynamicQuantize(OpRun):
    """TensorRT's dynamic quantization to NVFP4: scale = e4m3(max|block| / (6 · s2)), code = e2m1(x / (scale · s2))."""

    op_domain = "trt"

    @staticmethod
    def quantize(x: Array, s2: float, block_size: int) -> tuple[Array, Array]:
        """Return codes and scales of x [..., K]; a block of zeros has the scale 0."""
        blocks = x.astype(np.float32).reshape(*x.shape[:-1], -1, block_size)
        peak = np.abs(blocks).max(-1)
        scale = np.minimum(peak / np.float32(6 * s2), 448).astype(ml_dtypes.float8_e4m3fn)
        step = scale.astype(np.float32)[..., None] * np.float32(s2)
        ratio = np.divide(blocks, step, out=np.zeros_like(blocks), where=step > 0)
        codes = np.clip(ratio, -6, 6).reshape(x.shape).astype(ml_dtypes.float4_e2m1fn)
        return codes, scale

    def _run(self, x: Array, scale: Array, axis: int, block_size: int, scale_type: int) -> tuple[Array, Array]:
        assert (axis, scale_type) == (-1, 17)
        return self.quantize(x, float(scale), block_size)


FP4DynamicQuantize.__name__ = "TRT_FP4DynamicQuantize"  # the evaluator goes by it


class OnnxRunner:
    """The very file that an engine is built from, run with one set of weights."""

    def __init__(self, entry: OnnxEntry, parameters: Mapping[str, Tensor]) -> None:
        self.entry = entry
        self._session = ReferenceEvaluator(onnx.load_from_string(entry.to_bytes()), new_ops=[FP4DynamicQuantize])
        self._weights = {b.name: to_numpy(parameters[parameter_of(b.name)], b) for b in entry.weights}

    def run(self, arguments: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the outputs; next states under the names of the states, of FP8 caches as they are stored."""
        named = {b.name: b.source if b.kind == "view" else b.name for b in self.entry.arguments}
        feeds = self._weights | {b.name: to_numpy(arguments[named[b.name]], b) for b in self.entry.arguments}
        outputs: Any = self._session.run(None, feeds)
        viewed = {b.source: b.shape for b in self.entry.arguments if b.kind == "view"}
        return {
            b.source: in_fp8(array, viewed[b.source]) if b.source in viewed else from_numpy(array)
            for b, array in zip(self.entry.results, outputs, strict=True)
        }
