"""Transformer Engine's own Python: its recipes take our flags, its reference quantizer gives our values.

`make test-oracles` unpacks its wheel, which runs on a GPU only: these two files of it run anywhere.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from n3c.specs.schema import Training
from support.modules import import_file

from .generated import imported, tiny_spec, write_generated

pytestmark = pytest.mark.oracles

WHEEL = Path(sys.prefix) / "transformer_engine" / "transformer_engine"
PACKAGE = "transformer_engine.pytorch"


@pytest.fixture(scope="module")
def emitted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[types.SimpleNamespace]:
    folder = tmp_path_factory.mktemp("engine")
    write_generated(replace(tiny_spec(), training=Training("nvfp4")), folder)
    with imported(folder) as modules:
        yield modules


@pytest.fixture
def recipes(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return transformer_engine.common.recipe, as it is where the environment says the opposite of our flags."""
    assert WHEEL.is_dir(), "`make test-oracles` unpacks Transformer Engine there"
    for name in ("DISABLE_RHT", "DISABLE_STOCHASTIC_ROUNDING", "DISABLE_2D_QUANTIZATION", "ROW_SCALED_ACTIVATION"):
        monkeypatch.setenv(f"NVTE_NVFP4_{name}", "1")
    monkeypatch.setenv("NVTE_NVFP4_4OVER6", "all")
    monkeypatch.setenv("NVTE_BACKWARD_OVERRIDE", "dequantized")
    return import_file(WHEEL / "common" / "recipe" / "__init__.py")


def test_recipes(emitted: Any, recipes: Any) -> None:
    """Every field is given, and the recipe is the paper's: 2-D weights, RHT for dW, stochastic gradients."""
    for kind, values in emitted.blackwell.RECIPES.items():
        made = emitted.blackwell.recipe(kind, recipes)
        assert type(made).__name__ == emitted.blackwell.CLASSES[kind]
        assert {field.name for field in dataclasses.fields(made)} == values.keys()
        assert all(getattr(made, n) == v for n, v in values.items() if not n.endswith("format"))
    nvfp4 = emitted.blackwell.recipe("nvfp4", recipes)
    used = [nvfp4.fp4_quant_fwd_inp, nvfp4.fp4_quant_fwd_weight, nvfp4.fp4_quant_bwd_grad]
    flags = [(q.random_hadamard_transform, q.stochastic_rounding, q.fp4_2d_quantization) for q in used]
    assert flags == [(True, False, False), (False, False, True), (True, True, False)]
    assert (nvfp4.fp4_format, nvfp4.fp8_format) == (recipes.Format.E2M1, recipes.Format.E4M3)


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the module of the reference quantizer; stand-ins for the classes that it imports."""
    against: Any = import_file(Path(__file__).parents[3] / "benchmarks" / "against_te.py")
    for name, module in against.stand_ins(WHEEL / "pytorch" / "custom_recipes").items():
        monkeypatch.setitem(sys.modules, name, module)
    return importlib.import_module(f"{PACKAGE}.custom_recipes.reference_nvfp4")


def values(reference: Any, codes: Tensor, scales: Tensor, largest: Tensor) -> Tensor:
    """Return what a quantized matrix stands for, multiplied in the order of numerics.py."""
    numbers = reference.cast_from_fp4x2(codes.view(torch.uint8), torch.float32)
    rows, columns = numbers.shape
    by_block = scales.view(torch.float8_e4m3fn).float()[:rows, : columns // 16]
    decode = by_block * (1 / torch.full_like(largest, 448.0 * 6.0).div(largest))
    matrix: Tensor = numbers * decode.repeat_interleave(16, dim=1)
    return matrix


@pytest.mark.parametrize("tile", [(1, 16), (16, 16)], ids=["activations", "weights"])
@pytest.mark.parametrize("size", [1e-4, 1.0, 300.0])
def test_codes_and_scales(emitted: Any, reference: Any, tile: tuple[int, int], size: float) -> None:
    """Bit for bit, of matrices with heavy tails: equal values are equal codes and scales."""
    generator = torch.Generator().manual_seed(tile[0])
    x = torch.randn(256, 512, generator=generator) * size * torch.logspace(-2, 2, 256)[:, None]
    formats = sys.modules[f"{PACKAGE}.custom_recipes.reference_utils"].Fp4Formats
    quantizer = reference.NVFP4QuantizerRef(dtype=formats.E2M1, quant_tile_shape=tile)
    codes, scales, turned, turned_scales, largest, turned_largest = quantizer._quantize(x)
    assert torch.equal(emitted.numerics.nvfp4(x, tile[0]), values(reference, codes, scales, largest))
    transposed = values(reference, turned, turned_scales, turned_largest)
    assert torch.equal(emitted.numerics.nvfp4(x.T.contiguous(), tile[0]), transposed)
    assert torch.equal(transposed.T, values(reference, codes, scales, largest)) == (tile[0] == 16)


def test_hadamard_transform(emitted: Any, reference: Any) -> None:
    """The operand of the weight gradient: transposed, transformed by its signs, quantized 1 x 16."""
    x = torch.randn(128, 96, generator=torch.Generator().manual_seed(2))
    formats = sys.modules[f"{PACKAGE}.custom_recipes.reference_utils"].Fp4Formats
    quantizer = reference.NVFP4QuantizerRef(dtype=formats.E2M1, quant_tile_shape=(1, 16), with_rht=True)
    mixed = emitted.numerics.hadamard(x.T.contiguous())
    torch.testing.assert_close(mixed, quantizer._apply_rht(x.T.contiguous()), atol=1e-6, rtol=1e-6)
    _, _, codes, scales, _, largest = quantizer._quantize(x)
    ours, theirs = emitted.numerics.nvfp4(mixed), values(reference, codes, scales, largest)
    # Sums in another order may move a value over the border between two codes.
    assert (ours != theirs).float().mean() < 1e-3
