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
from torch import Tensor

from n3c.backends.onnx.bindings import Binding
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


class OnnxRunner:
    """The very file that an engine is built from, run with one set of weights."""

    def __init__(self, entry: OnnxEntry, parameters: Mapping[str, Tensor]) -> None:
        self.entry = entry
        self._session = ReferenceEvaluator(onnx.load_from_string(entry.to_bytes()))
        self._weights = {b.name: to_numpy(parameters[b.name], b) for b in entry.weights}

    def run(self, arguments: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the outputs; next states under the names of the states."""
        feeds = self._weights | {b.name: to_numpy(arguments[b.name], b) for b in self.entry.arguments}
        outputs: Any = self._session.run(None, feeds)
        return {b.source: from_numpy(array) for b, array in zip(self.entry.results, outputs, strict=True)}
