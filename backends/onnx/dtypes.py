"""IR element types as ONNX spells them."""

from __future__ import annotations

import onnx_ir as onnx

from n3c.ir.types import DType

ONNX_DTYPES = {
    DType.F32: onnx.DataType.FLOAT,
    DType.F16: onnx.DataType.FLOAT16,
    DType.BF16: onnx.DataType.BFLOAT16,
    DType.F8E4M3: onnx.DataType.FLOAT8E4M3FN,
    DType.F4E2M1: onnx.DataType.FLOAT4E2M1,
    DType.I64: onnx.DataType.INT64,
    DType.I8: onnx.DataType.INT8,
}
