"""The formats of weights, told by the tensors that store them: ModelOpt's layout, compressed-tensors', and neither."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from n3c.backends.safetensors.checkpoint import Checkpoint
from n3c.backends.safetensors.inventory import inventory, weight_formats

CODES, BLOCKS, ONE = torch.zeros(4, 8, dtype=torch.uint8), torch.ones(4, 1).to(torch.float8_e4m3fn), torch.ones(1)
HALF = torch.zeros(4, 16, dtype=torch.bfloat16)
EIGHT = HALF.to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("layout", "tensors", "format_"),
    [
        ("plain", {"a.weight": HALF}, "bf16"),
        ("plain", {"a.weight": HALF.float()}, "f32"),
        ("plain", {"a.weight": EIGHT}, "f8_e4m3"),
        ("modelopt", {"a.weight": EIGHT, "a.weight_scale": ONE}, "fp8"),
        ("modelopt", {"a.weight": HALF.to(torch.int8), "a.weight_scale": ONE}, "i8"),
        ("modelopt", {"a.weight": CODES, "a.weight_scale": BLOCKS}, "u8"),
        ("modelopt", {"a.weight": HALF, "a.weight_scale": BLOCKS, "a.weight_scale_2": ONE}, "bf16"),
        ("modelopt", {"a.weight": CODES, "a.weight_scale": BLOCKS, "a.weight_scale_2": ONE}, "w4a16_nvfp4"),
        (
            "modelopt",
            {"a.weight": CODES, "a.weight_scale": BLOCKS, "a.weight_scale_2": ONE, "a.input_scale": ONE},
            "nvfp4",
        ),
        (
            "compressed-tensors",
            {"a.weight_packed": CODES, "a.weight_scale": BLOCKS, "a.weight_global_scale": ONE},
            "w4a16_nvfp4",
        ),
        (
            "compressed-tensors",
            {
                "a.weight_packed": CODES,
                "a.weight_scale": BLOCKS,
                "a.weight_global_scale": ONE,
                "a.input_global_scale": ONE,
            },
            "nvfp4",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_weight(layout: str, tensors: dict[str, Tensor], format_: str, tmp_path: Path) -> None:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    found = inventory(Checkpoint(tmp_path))
    assert weight_formats(Checkpoint(tmp_path)) == {"a.weight": format_}
    assert (found.layout, found.files, found.tensors) == (layout, 1, len(tensors))
    assert found.by_format == {format_: (1, found.bytes)}
    assert found.bytes == sum(tensor.nbytes for tensor in tensors.values())


def test_scales_without_a_weight(tmp_path: Path) -> None:
    save_file({"a.input_scale": ONE, "b.bias": ONE.clone()}, tmp_path / "model.safetensors")
    assert weight_formats(Checkpoint(tmp_path)) == {"a.weight": "scales without a weight", "b.bias": "f32"}
