"""Embedded weights among a plan's constants: found by their names, or else by layer, type and size."""

from __future__ import annotations

from n3c.backends.onnx.bindings import Binding
from n3c.backends.trt.constants import weights_as_inputs
from n3c.backends.trt.layers import Kernel, TensorInfo

LAYER = "backbone.layers.3.mixer"


def tensor(name: str, dtype: str, *dims: int) -> TensorInfo:
    return TensorInfo(name, dims, (1,) * len(dims), dtype)


def weight(name: str, dtype: str, *shape: int) -> Binding:
    return Binding(f"{LAYER}.{name}", "weight", dtype, shape, "")


WEIGHTS = (
    weight("up.weight", "f8e4m3", 4, 8),
    weight("down.weight", "f8e4m3", 8, 8),
    weight("q.weight", "f4e2m1", 4, 8),
    weight("k.weight", "f4e2m1", 4, 8),
    weight("norm.weight", "f32", 8),
)


def found(*constants: TensorInfo, layer: str = LAYER) -> tuple[list[str], list[str]]:
    """Return the weights that a kernel of `layer` is found to read, and the constants that are left."""
    kernel = Kernel("kernel", "kgen", "", (), (), constants, (f"{layer}/MatMul",))
    (made,) = weights_as_inputs([kernel], WEIGHTS)
    return [each.name.removeprefix(f"{LAYER}.") for each in made.inputs], [each.name for each in made.constants]


def test_a_name_that_was_kept() -> None:
    assert found(tensor(f"{LAYER}.norm.weight_constant0_myl3", "Float", 8)) == (["norm.weight"], [])


def test_a_name_that_was_lost() -> None:
    """Two of one type and size are two weights, in their order."""
    assert found(tensor("c1", "FP8", 8, 8)) == (["down.weight"], [])
    assert found(tensor("c1", "FP4E2M1", 32), tensor("c2", "FP4E2M1", 32)) == (["q.weight", "k.weight"], [])


def test_other_constants_stay() -> None:
    assert found(tensor("size", "FP8", 9, 8)) == ([], ["size"])
    assert found(tensor("type", "Float", 8)) == ([], ["type"])
    assert found(tensor("layer", "FP8", 8, 8), layer="backbone.layers.31.mixer") == ([], ["layer"])


def test_a_constant_of_two_kernels_is_one_weight() -> None:
    kernels = [Kernel(name, "kgen", "", (), (), (tensor("c", "FP8", 8, 8),), (f"{LAYER}/MatMul",)) for name in "ab"]
    assert [each.inputs[0].name for each in weights_as_inputs(kernels, WEIGHTS)] == [f"{LAYER}.down.weight"] * 2
