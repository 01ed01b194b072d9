"""How weights are stored in each format."""

from __future__ import annotations

from typing import get_args

import pytest

from n3c.ir.formats import FORMATS, WeightFormat
from n3c.ir.types import DType, TensorType
from n3c.specs.schema import Format

EXPERTS = TensorType(DType.BF16, (8, 48, 32))


def test_the_formats_are_those_of_the_schema() -> None:
    assert tuple(FORMATS) == get_args(Format)
    assert all(FORMATS[name].name == name for name in FORMATS)


@pytest.mark.parametrize(
    ("name", "bits", "stored"),
    [
        ("nvfp4", 4.5, {"": "f4e2m1[8, 48, 32]", "_scale": "f8e4m3[8, 48, 2]", "_scale_2": "f32[8]"}),
        ("w4a16_nvfp4", 4.5, {"": "f4e2m1[8, 48, 32]", "_scale": "f8e4m3[8, 48, 2]", "_scale_2": "f32[8]"}),
        ("fp8", 8.0, {"": "f8e4m3[8, 48, 32]", "_scale": "f32[8]"}),
        ("bf16", 16.0, {"": "bf16[8, 48, 32]"}),
    ],
)
def test_parts_and_bits(name: str, bits: float, stored: dict[str, str]) -> None:
    format_ = FORMATS[name]
    assert {part.suffix: str(part.type(EXPERTS)) for part in format_.parts} == stored
    assert format_.bits == bits
    of_matrices = 4 * 8 * (len(format_.scales) > 0)
    assert format_.bytes(EXPERTS) == EXPERTS.elements * bits / 8 + of_matrices
    assert format_.part_names("w") == {part.name: f"w{part.suffix}" for part in format_.parts}


@pytest.mark.parametrize(
    ("format_", "shape", "block_rows", "divides"),
    [
        (FORMATS["nvfp4"], (24, 64), 1, True),
        (FORMATS["nvfp4"], (24, 64), 16, False),
        (FORMATS["w4a16_nvfp4"], (32, 24), 1, False),
        (FORMATS["fp8"], (3, 5), 16, True),
    ],
)
def test_whole_blocks(format_: WeightFormat, shape: tuple[int, int], block_rows: int, divides: bool) -> None:
    assert format_.divides(*shape, block_rows) == divides


def test_only_formats_with_quantized_activations_have_a_scale_of_the_input() -> None:
    divisors = {name: format_.input_divisor for name, format_ in FORMATS.items()}
    assert divisors == {"nvfp4": 2688, "w4a16_nvfp4": None, "fp8": 448, "bf16": None}
    assert FORMATS["nvfp4"].weight_only == "w4a16_nvfp4"
