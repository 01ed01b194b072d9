"""Two programs that run an ONNX graph on a CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx.reference.op_run import OpRun

from n3c.runtime.engines.interface import Array
from n3c.runtime.engines.onnxruntime.session import inference_session

from .onnx_graph import Evaluate


class FP4DynamicQuantize(OpRun):
    """TensorRT's dynamic quantization to NVFP4: scale = e4m3(max|block| / (6 s)), code = e2m1(x / (scale s))."""

    op_domain = "trt"

    def _run(self, x: Array, scale: Array, axis: int, block_size: int, scale_type: int) -> tuple[Array, Array]:
        blocks = x.astype(np.float32).reshape(*x.shape[:-1], -1, block_size)
        largest = np.abs(blocks).max(-1)
        scales = np.minimum(largest / np.float32(6 * float(scale)), 448).astype(ml_dtypes.float8_e4m3fn)
        step = scales.astype(np.float32)[..., None] * np.float32(scale)
        ratio = np.divide(blocks, step, out=np.zeros_like(blocks), where=step > 0)
        return np.clip(ratio, -6, 6).reshape(x.shape).astype(ml_dtypes.float4_e2m1fn), scales


FP4DynamicQuantize.__name__ = "TRT_FP4DynamicQuantize"  # the evaluator goes by it


class GatherElements(OpRun):
    """As the standard says; the evaluator's own takes no more than 63 elements along the axis."""

    op_domain = ""

    def _run(self, data: Array, indices: Array, axis: int = 0) -> tuple[Array]:
        return (np.take_along_axis(data, np.where(indices < 0, indices + data.shape[axis], indices), axis),)


class GatherND(OpRun):
    """As the standard says; the evaluator's own goes through the elements one by one, which takes minutes."""

    op_domain = ""

    def _run(self, data: Array, indices: Array, batch_dims: int = 0) -> tuple[Array]:
        batch = np.indices(indices.shape[:-1], sparse=True)[:batch_dims]
        return (data[(*batch, *np.moveaxis(indices, -1, 0))],)


def reference_evaluator(model: onnx.ModelProto) -> Evaluate:
    """ONNX's own evaluator in Python, which knows FP4, FP8 and BF16: it runs the very file of an engine."""
    from onnx.reference import ReferenceEvaluator

    return _evaluate(ReferenceEvaluator(model, new_ops=[FP4DynamicQuantize, GatherElements, GatherND]))


def onnx_runtime(model: onnx.ModelProto) -> Evaluate:
    """ONNX Runtime on the CPU, for float32 renderings."""
    return _evaluate(inference_session(model.SerializeToString()))


def _evaluate(session: Any) -> Evaluate:
    def evaluate(inputs: Mapping[str, Array]) -> Sequence[Array]:
        outputs: Sequence[Array] = session.run(None, dict(inputs))
        return outputs

    return evaluate
