"""`python -m benchmarks.against_te WHEEL`: compare 16x16 packing with Transformer Engine's reference quantizer.

WHEEL is `transformer_engine-2.20.2-py3-none-any.whl` (`pip download --no-deps transformer_engine==2.20.2`). Its
pure-PyTorch reference, `pytorch/custom_recipes/reference_nvfp4.py`, is taken out of it and run without the
library, which needs a GPU: the four classes that it imports are stood in for here.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from n3c.backends.safetensors import nvfp4
from n3c.backends.safetensors.packing import Array, pack_nvfp4

PACKAGE = "transformer_engine.pytorch"
VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def stand_ins(recipes: Path) -> dict[str, types.ModuleType]:
    """Return modules by name, for `sys.modules`: what the reference quantizer imports from Transformer Engine.

    `recipes` is the folder `custom_recipes`, from which the quantizer itself can be imported then.
    """

    class Storage:
        """Stands in for QuantizedTensorStorage."""

    class Quantizer:
        """Stands in for Quantizer: keeps which layouts are wanted."""

        def __init__(self, *, rowwise: bool, columnwise: bool) -> None:
            self.rowwise_usage, self.columnwise_usage = rowwise, columnwise

    def is_custom(_: object) -> bool:
        return True

    contents: dict[str, dict[str, Any]] = {
        "transformer_engine": {"__path__": []},
        PACKAGE: {"__path__": []},
        f"{PACKAGE}.custom_recipes": {"__path__": [str(recipes)]},
        f"{PACKAGE}.quantized_tensor": {"QuantizedTensorStorage": Storage, "Quantizer": Quantizer},
        f"{PACKAGE}.tensor": {"__path__": []},
        f"{PACKAGE}.tensor.utils": {"is_custom": is_custom},
    }
    modules = {name: types.ModuleType(name) for name in contents}
    for name, content in contents.items():
        modules[name].__dict__.update(content)
    return modules


def load_reference(wheel: Path, folder: Path) -> Any:
    """Return the module of the reference quantizer."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [n for n in archive.namelist() if "/custom_recipes/" in n])
    sys.modules.update(stand_ins(folder / PACKAGE.replace(".", "/") / "custom_recipes"))
    return importlib.import_module(f"{PACKAGE}.custom_recipes.reference_nvfp4")


def weights() -> Iterator[tuple[str, Tensor]]:
    """Yield named weights."""
    g = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        kind = str(dtype).removeprefix("torch.")
        normal = torch.randn(1024, 2688, generator=g) * 0.02
        yield f"gaussian {kind}", normal.to(dtype)
        yield f"heavy tails {kind}", (normal / torch.randn(1024, 2688, generator=g).abs().clamp_min(0.05)).to(dtype)
        scale = torch.exp(torch.randn(1024, 1, generator=g)) * torch.exp(torch.randn(1, 2688, generator=g))
        yield f"unequal rows and columns {kind}", (normal * scale).to(dtype)


def compare(reference: Any, weight: Tensor) -> tuple[int, int, int, int, float, float]:
    """Return codes that differ and all, scales that differ and all, and both relative errors."""
    formats = sys.modules[f"{PACKAGE}.custom_recipes.reference_utils"].Fp4Formats
    quantizer = reference.NVFP4QuantizerRef(dtype=formats.E2M1, quant_tile_shape=(16, 16), columnwise=False)
    theirs = quantizer.quantize(weight)
    array: Array = (
        weight.view(torch.uint16).numpy().view(ml_dtypes.bfloat16) if weight.dtype is torch.bfloat16 else weight.numpy()
    )
    ours = pack_nvfp4(array, 16)
    amax = np.float32(theirs.global_amax_row.item())
    packed = theirs.data.view(torch.uint8).numpy()[: ours.codes.shape[0], : ours.codes.shape[1]]
    scale = theirs.scale.view(torch.uint8).numpy()[: ours.scale.shape[0], : ours.scale.shape[1]]
    twin = nvfp4.Nvfp4Matrix(packed, scale.view(ml_dtypes.float8_e4m3fn), np.float32(amax / np.float32(2688)))
    mine, his = nvfp4.unpack(ours.codes), nvfp4.unpack(packed)
    same_scale = np.repeat(ours.scale.view(np.uint8) == scale, 16, axis=1)
    apart = np.abs(mine.astype(int) % 8 - his.astype(int) % 8)[same_scale]
    assert apart.max() <= 1, "a code is off by more than one"
    steps = np.abs(ours.scale.view(np.uint8).astype(int) - scale.astype(int))
    assert steps.max() <= 1, "a scale is off by more than one E4M3 code"
    exact = array.astype(np.float64)
    errors = [((nvfp4.dequantize(m) - exact) ** 2).sum() / (exact**2).sum() for m in (ours, twin)]
    return int((mine != his).sum()), mine.size, int((steps > 0).sum()), steps.size, errors[0], errors[1]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path)
    with tempfile.TemporaryDirectory() as folder:
        reference = load_reference(parser.parse_args().wheel, Path(folder))
        print("| weight [1024, 2688] | codes that differ | scales that differ | relative error: n3c | TE |")
        print("|---|---:|---:|---:|---:|")
        for name, weight in weights():
            codes, all_codes, scales, all_scales, ours, theirs = compare(reference, weight)
            print(f"| {name} | {codes} of {all_codes} | {scales} of {all_scales} | {ours:.6f} | {theirs:.6f} |")


if __name__ == "__main__":
    main()
