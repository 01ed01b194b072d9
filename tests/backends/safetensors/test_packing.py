"""Packing, against ModelOpt bit for bit, and against plain float64 arithmetic for both block shapes."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from n3c.backends.safetensors import nvfp4, packing, packing_kernels
from n3c.backends.safetensors.packing import NotFiniteError, Search, pack_nvfp4

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

modelopt: Any = NVFP4QTensor

Make = Callable[[torch.Generator, int, int], Tensor]


def normal(g: torch.Generator, n: int, k: int) -> Tensor:
    return torch.randn(n, k, generator=g)


def heavy(g: torch.Generator, n: int, k: int) -> Tensor:
    return normal(g, n, k) / normal(g, n, k).abs().clamp_min(1e-4)


def outlier(g: torch.Generator, n: int, k: int) -> Tensor:
    weight = normal(g, n, k)
    weight[n // 2, k // 3] = 1e6
    return weight


def sparse(g: torch.Generator, n: int, k: int) -> Tensor:
    weight = normal(g, n, k) * (torch.rand(n, k, generator=g) < 0.05)
    weight[:, :16] = 0
    weight[0, -1] = 1
    return weight


def ties(g: torch.Generator, n: int, k: int) -> Tensor:
    """Return multiples of a quarter of 6, the amax of each block 6: quotients fall on E2M1's ties."""
    weight = torch.randint(-24, 25, (n, k), generator=g) / 4
    weight[:, ::16] = 6
    return weight


def unequal(g: torch.Generator, n: int, k: int) -> Tensor:
    return normal(g, n, k) * torch.exp(3 * normal(g, n, 1)) * torch.exp(3 * normal(g, 1, k))


def constant(g: torch.Generator, n: int, k: int) -> Tensor:
    return torch.full((n, k), float(torch.rand(1, generator=g)) + 0.01)


def signs(g: torch.Generator, n: int, k: int) -> Tensor:
    """Return zeros of both signs among few values."""
    weight = torch.randint(-1, 2, (n, k), generator=g).float()
    weight[weight == 0] = -0.0
    weight[0, 0] = 1
    return weight


def denormal(g: torch.Generator, n: int, k: int) -> Tensor:
    return normal(g, n, k) * 1e-39


def vanishing(g: torch.Generator, n: int, k: int) -> Tensor:
    """Return values so small that amax / 2688 is one of the last denormals."""
    return normal(g, n, k) * 1e-40


def huge(g: torch.Generator, n: int, k: int) -> Tensor:
    return (normal(g, n, k) * 1e37).clamp(-3e38, 3e38)


KINDS: tuple[Make, ...] = (
    normal, heavy, outlier, sparse, ties, unequal, constant, signs, denormal, vanishing, huge
)  # fmt: skip
SHAPES = ((1, 16), (3, 48), (16, 64), (17, 272), (33, 16), (64, 512))
DTYPES = (torch.float32, torch.bfloat16)


def as_numpy(weight: Tensor) -> packing.Array:
    if weight.dtype is torch.bfloat16:
        return weight.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return weight.numpy()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", KINDS)
def test_1x16_has_the_bits_of_modelopt(make: Make, dtype: torch.dtype) -> None:
    """264 tensors in all: 11 kinds, 2 types, 6 shapes, 2 seeds."""
    for shape in SHAPES:
        for seed in range(2):
            weight = make(torch.Generator().manual_seed(seed), *shape).to(dtype)
            expected, scale, scale_2 = modelopt.quantize(weight.clone(), 16)
            ours = pack_nvfp4(as_numpy(weight), 1)
            where = f"{shape} seed {seed}"
            np.testing.assert_array_equal(ours.scale_2, scale_2.numpy(), where)
            np.testing.assert_array_equal(ours.scale.view(np.uint8), scale.view(torch.uint8).numpy(), where)
            np.testing.assert_array_equal(ours.codes, expected._quantized_data.numpy(), where)


def plain(weight: np.ndarray, block_rows: int, search: Search) -> tuple[np.ndarray, np.ndarray]:
    """Return E4M3 scales [N/block_rows, K/16] and values of the codes [N, K]; float64, one block at a time.

    The search tries all 126 scales, not those near the nominal one.
    """
    grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    e4m3 = np.arange(1, 127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    scale_2 = float(plain_scale_2(weight, search))
    scales = np.empty((weight.shape[0] // block_rows, weight.shape[1] // 16))
    values = np.empty(weight.shape)
    for r in range(scales.shape[0]):
        for c in range(scales.shape[1]):
            block = np.s_[block_rows * r : block_rows * (r + 1), 16 * c : 16 * c + 16]
            tile = weight[block].astype(np.float64)
            nominal = int(np.argmin(np.abs(e4m3 - np.abs(tile).max() / (6 * scale_2))))
            tried = range(e4m3.size) if search == "mse" else [nominal]
            found: list[tuple[float, float, np.ndarray]] = []
            for code in tried:
                step = e4m3[code] * scale_2
                near = grid[np.argmin(np.abs(np.abs(tile)[..., None] / step - grid), axis=-1)] * np.sign(tile)
                found.append((((near * step - tile) ** 2).sum(), e4m3[code], near))
            _, scales[r, c], values[block] = min(found, key=itemgetter(0))
    return scales, values


def plain_scale_2(weight: np.ndarray, search: Search) -> np.float32:
    return np.float32(np.abs(weight).max()) / np.float32(6 * (256 if search == "mse" else 448))


@pytest.mark.parametrize("search", ["none", "mse"])
@pytest.mark.parametrize("block_rows", [1, 16])
def test_codes_and_scales_are_what_plain_arithmetic_gives(block_rows: int, search: Search) -> None:
    """Random float32 weights have no ties, so that codes and scales must agree to the last one.

    The window of a search finds what the sweep over all scales finds.
    """
    weight = np.random.default_rng(3).normal(size=(64, 96)).astype(np.float32)
    scales, values = plain(weight, block_rows, search)
    matrix = pack_nvfp4(weight, block_rows, search)
    assert matrix.scale_2 == plain_scale_2(weight, search)
    np.testing.assert_array_equal(matrix.scale.astype(np.float64), np.repeat(scales, block_rows, axis=0))
    codes = nvfp4.unpack(matrix.codes).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    np.testing.assert_array_equal(codes, values)


@pytest.mark.parametrize("block_rows", [1, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_is_the_numpy_form(block_rows: int, dtype: torch.dtype) -> None:
    for make in KINDS:
        weight = as_numpy(make(torch.Generator().manual_seed(5), 48, 80).to(dtype))
        expected, ours = nvfp4.quantize(weight, block_rows), pack_nvfp4(weight, block_rows)
        assert ours.scale_2 == expected.scale_2
        np.testing.assert_array_equal(ours.scale.view(np.uint8), expected.scale.view(np.uint8), make.__name__)
        np.testing.assert_array_equal(ours.codes, expected.codes, make.__name__)


@pytest.mark.parametrize("scale_2", [1e-45, 1e-40, 3.1e-6, 1.0, 1e35])
def test_every_bf16_value_gets_the_code_of_its_quotient(scale_2: float) -> None:
    """All finite values with a sample of block scales, and float32 values beside the bounds between codes."""
    finite = np.arange(0x7F80, dtype=np.uint16)
    every = np.concatenate([finite, finite | np.uint16(0x8000)])[None, :]
    table = packing_kernels.E4M3 * np.float32(scale_2)
    for code in (1, 2, 7, 8, 9, 56, 61, 90, 125, 126):
        check_codes(every, code, table)
        between = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 1e-45], np.float32) * table[code]
        near = between.view(np.int32)[:, None] + np.arange(-8, 8, dtype=np.int32)
        check_codes(np.clip(near, 0, 0x7F7FFFFF).astype(np.uint32).reshape(1, -1), code, table)


def check_codes(bits: packing_kernels.Bits, code: int, table: packing_kernels.Floats) -> None:
    scales = np.full((1, bits.shape[1] // 16), code, np.uint8)
    out = np.empty((1, bits.shape[1] // 2), np.uint8)
    packing_kernels.pack_rows(bits, scales, table, out)
    w = bits.view(ml_dtypes.bfloat16 if bits.dtype == np.uint16 else np.float32).astype(np.float32)
    with np.errstate(all="ignore"):
        expected = nvfp4.pack(nvfp4.e2m1_codes(w / table[code]))
    np.testing.assert_array_equal(out, expected, f"block scale {code}")


def relative_error(weight: packing.Array, matrix: nvfp4.Nvfp4Matrix) -> float:
    exact = weight.astype(np.float64)
    return float(((nvfp4.dequantize(matrix) - exact) ** 2).sum() / (exact**2).sum())


@pytest.mark.parametrize(("block_rows", "gain"), [(1, 0.25), (16, 0.07)])
def test_search_lowers_the_error(block_rows: int, gain: float) -> None:
    for make in (normal, heavy, unequal):
        weight = as_numpy(make(torch.Generator().manual_seed(1), 256, 512).bfloat16())
        plain, searched = (relative_error(weight, pack_nvfp4(weight, block_rows, s)) for s in ("none", "mse"))
        assert searched < plain, make.__name__
    weight = as_numpy(normal(torch.Generator().manual_seed(1), 256, 512))
    plain, searched = (relative_error(weight, pack_nvfp4(weight, block_rows, s)) for s in ("none", "mse"))
    assert searched < (1 - gain) * plain


@pytest.mark.parametrize("search", ["none", "mse"])
@pytest.mark.parametrize("block_rows", [1, 16])
def test_the_sums_are_those_of_the_dequantized_weight(block_rows: int, search: Search) -> None:
    for make in (normal, heavy, huge, denormal):
        weight = as_numpy(make(torch.Generator().manual_seed(2), 32, 64))
        signal, noise = packing.nvfp4_noise(weight, block_rows, search)
        exact = weight.astype(np.float64)
        error = nvfp4.dequantize(pack_nvfp4(weight, block_rows, search)).astype(np.float64) - exact
        np.testing.assert_allclose([signal, noise], [(exact**2).sum(), (error**2).sum()], rtol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_has_the_bits_of_pytorch(dtype: torch.dtype) -> None:
    for make in KINDS:
        weight = make(torch.Generator().manual_seed(7), 33, 48).to(dtype)
        scale = packing.fp8_scale(packing.largest(as_numpy(weight)))
        assert scale == (weight.float().abs().max() / 448).numpy()
        expected = (weight / torch.tensor(scale)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        np.testing.assert_array_equal(packing.pack_fp8_rows(as_numpy(weight), scale).codes, expected, make.__name__)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sums_of_fp8_are_those_of_the_dequantized_weight(dtype: torch.dtype) -> None:
    for make in (normal, heavy):
        weight = make(torch.Generator().manual_seed(3), 32, 64).to(dtype)
        signal, noise = packing.fp8_noise(as_numpy(weight))
        scale = weight.float().abs().max() / 448
        exact, values = weight.double(), (weight / scale).to(torch.float8_e4m3fn).double() * scale.double()
        sums = [float(exact.square().sum()), float((values - exact).square().sum())]
        np.testing.assert_allclose([signal, noise], sums, rtol=1e-4)


@pytest.mark.parametrize("block_rows", [1, 16])
@pytest.mark.parametrize("search", ["none", "mse"])
def test_zeros_are_finite(block_rows: int, search: Search) -> None:
    """ModelOpt gives NaN scales for a tensor of zeros; here it is zeros with scales of 1."""
    matrix = pack_nvfp4(np.zeros((16, 32), ml_dtypes.bfloat16), block_rows, search)
    assert matrix.scale_2 == 1
    assert (matrix.scale.astype(np.float32) == 1).all()
    assert not nvfp4.dequantize(matrix).any()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_named(dtype: type, value: float) -> None:
    weight: packing.Array = np.ones((32, 48), dtype)
    weight[19, 37] = value
    with pytest.raises(NotFiniteError) as caught:
        pack_nvfp4(weight, 1)
    assert caught.value.index == (19, 37)
    assert str(value) in str(caught.value)


def test_half_precision_is_packed_as_its_float32() -> None:
    weight = np.random.default_rng(0).normal(size=(16, 64)).astype(np.float16)
    one, other = pack_nvfp4(weight, 1), pack_nvfp4(weight.astype(np.float32), 1)
    np.testing.assert_array_equal(one.codes, other.codes)


@pytest.mark.parametrize(("shape", "rows"), [((16, 24), 1), ((8, 16), 16)])
def test_what_does_not_divide_is_refused(shape: tuple[int, int], rows: int) -> None:
    with pytest.raises(ValueError, match="does not divide"):
        pack_nvfp4(np.ones(shape, np.float32), rows)


def test_one_file_holds_all_compiled_code() -> None:
    """The compiler's cache on the disk does not notice a change in another file whose code it has inlined."""
    root = Path(__file__).parents[3]
    folders = ("backends", "compiler", "passes", "runtime")
    using = {path for folder in folders for path in (root / folder).rglob("*.py") if "import numba" in path.read_text()}
    assert {path.name for path in using} == {"packing_kernels.py"}
    others = [path for folder in folders for path in (root / folder).rglob("*.py") if path not in using]
    assert not [path for path in others if "@compiled" in path.read_text()]


def test_a_user_without_a_cache_folder_packs_all_the_same() -> None:
    """As installed by root and run with a read-only home: numba then has no place for its compiled code."""
    code = (
        "import numpy as np; from n3c.backends.safetensors.packing_kernels import largest_bits\n"
        "print(largest_bits(np.array([3, 7], np.uint16)))"
    )
    nowhere = os.environ | {"NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator"}
    nowhere.pop("NUMBA_CACHE_DIR", None)
    done = subprocess.run([sys.executable, "-c", code], env=nowhere, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "7\n"), done.stderr
