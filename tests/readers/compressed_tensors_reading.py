"""compressed-tensors' converter of ModelOpt's NVFP4 checkpoints, and its own decompression of what comes out.

See `reading.py` for how this is run and what it writes. Nothing is replaced. The library has no converter for
ModelOpt's FP8, whose tensors have the names and the meaning of its own `float-quantized` format: they are
decompressed as they are. Its formats have no word for the scales of a cache beside the weights of k and v.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .reading import SCALES_OF_WEIGHTS, Reading, main, tensors_of


def read(folder: Path) -> Reading:
    """Return what compressed-tensors decodes; tensors that it leaves as they are are not its to read."""
    from compressed_tensors.compressors.naive_quantized import FloatQuantizationCompressor
    from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
    from compressed_tensors.entrypoints.convert.converters import ModelOptNvfp4Converter

    tensors = tensors_of(folder)
    packed = [name.removesuffix(".weight") for name, tensor in tensors.items() if tensor.dtype == torch.uint8]
    in_fp8 = [name.removesuffix(".weight") for name in tensors if f"{name}_scale" in tensors]
    converter = ModelOptNvfp4Converter(targets=packed)
    converted = converter.validate({n: t for n, t in tensors.items() if n.rpartition(".")[0] in packed})
    reading = Reading({name: tensor for name, tensor in tensors.items() if not name.endswith(SCALES_OF_WEIGHTS)})
    for module in packed:
        local = state_of(converted, module)
        reading.values[f"{module}.weight"] = decompressed(NVFP4PackedCompressor, local, nvfp4_scheme())
        reading.formats[module] = "W4A16_NVFP4"
        if "input_global_scale" in local:
            reading.values[f"{module}.input_scale"] = 1 / local["input_global_scale"]
            reading.formats[module] = "NVFP4"
    for module in set(in_fp8) - set(packed):
        local = state_of(tensors, module)
        reading.values[f"{module}.weight"] = decompressed(FloatQuantizationCompressor, local, fp8_scheme())
        reading.formats[module] = "FP8"
    return reading


def state_of(tensors: dict[str, Tensor], module: str) -> dict[str, Tensor]:
    """Return the tensors of a module under their own last names."""
    return {n.rpartition(".")[2]: t for n, t in tensors.items() if n.rpartition(".")[0] == module}


def decompressed(compressor: Any, state: dict[str, Tensor], scheme: Any) -> Tensor:
    """Return the weight that a compressor makes of a module's tensors."""
    weight: Tensor = compressor.decompress(state, scheme)["weight"]
    return weight


def nvfp4_scheme() -> Any:
    """Return the library's own preset."""
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.quant_scheme import NVFP4

    return QuantizationScheme(**NVFP4, targets=["Linear"])


def fp8_scheme() -> Any:
    """Return the library's own preset."""
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.quant_scheme import FP8

    return QuantizationScheme(**FP8, targets=["Linear"])


if __name__ == "__main__":
    main("0.20.0", read)
