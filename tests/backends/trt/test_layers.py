"""The builder's listing of kernels."""

from __future__ import annotations

import pytest

from n3c.backends.trt.layers import Kernel, TensorInfo, parse_layers

LISTING = """Layers:
Name: __myl_MulSum_myl0_0, LayerType: kgen, Inputs: [ { Name: w.codes, Dimensions: [64,32], Strides: [32,1], \
StrideOrder: [1,0], Datatype: FP4E2M1, Format: (Linear) Row major linear format }, { Name: s, Dimensions: [], \
Strides: [], StrideOrder: [], Datatype: Float, Format: (Linear) Row major linear format }], Constants: [], \
Outputs: [ { Name: y, Dimensions: [1,64], Strides: [64,1], StrideOrder: [1,0], Datatype: Float, Format: (Linear) \
Row major linear format }], TacticName: __myl_MulSum_0x12, StreamId: 0, Metadata: [ONNX Layer: a/Mul]\
[ONNX Layer: a/Sum][ONNX Layer: b.c/Mul]
Name: signal0, LayerType: signal, Inputs: [], Outputs: [], TacticName: , StreamId: 1, Metadata:

I/O Tensors:
 Name: y, IOMode: Output, DataType: Float, Dimensions: [1,64]
"""


def test_kernels_with_their_tensors() -> None:
    codes = TensorInfo("w.codes", (64, 32), (32, 1), "FP4E2M1")
    scale = TensorInfo("s", (), (), "Float")
    y = TensorInfo("y", (1, 64), (64, 1), "Float")
    (kernel,) = parse_layers(LISTING)
    assert kernel == Kernel(
        "__myl_MulSum_myl0_0", "kgen", "__myl_MulSum_0x12", (codes, scale), (y,), (), ("a/Mul", "a/Sum", "b.c/Mul")
    )
    assert kernel.labels == ("a", "b.c")
    assert (codes.bytes, scale.bytes, y.bytes) == (1024, 4, 256)


def test_a_length_that_is_not_known() -> None:
    (kernel,) = parse_layers(LISTING.replace("Dimensions: [1,64]", "Dimensions: [1,-1]"))
    assert kernel.outputs[0].dynamic and not kernel.inputs[0].dynamic
    assert kernel.outputs[0].resolved(48) == TensorInfo("y", (1, 48), (64, 1), "Float")


@pytest.mark.parametrize("broken", [LISTING.replace("FP4E2M1", "Float7"), LISTING.replace("Outputs: [ {", "Gone: [ {")])
def test_a_listing_that_is_not_understood_is_no_empty_list(broken: str) -> None:
    with pytest.raises(ValueError, match=r"unknown element type Float7|no list of Outputs"):
        parse_layers(broken)
