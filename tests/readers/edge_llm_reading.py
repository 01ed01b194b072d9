"""TensorRT Edge-LLM's exporter: its models, its weight loader, and how it packs experts for its kernels.

See `reading.py` for how this is run and what it writes. Nothing is replaced. Of the wheel only the Python files are
unpacked; TensorRT and CUDA are not needed before an engine is built. Values are taken when all tensors are loaded
and before they are laid out for kernels; that, and packing experts, is then run for what it refuses.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .reading import SCALES_OF_WEIGHTS, Reading, main, tensors_of


def read(folder: Path) -> Reading:
    """Return what Edge-LLM's model, and its MTP draft where there are such tensors, hold after loading."""
    from tensorrt_edgellm import AutoModel
    from tensorrt_edgellm.checkpoint import loader

    tensors = tensors_of(folder)
    reading = Reading()
    lay_out = loader.apply_all_repacking
    for mtp in sorted({name.startswith("mtp.") for name in tensors}):

        def keep(model: Any, mtp: bool = mtp) -> None:
            take(model, tensors, reading, mtp=mtp)
            lay_out(model)

        loader.apply_all_repacking = keep
        model = AutoModel.from_pretrained(str(folder), mtp_draft=mtp)
        reading.kv_cache = (model.config.quant.kv_cache_quant or "").upper() or None
        for name, module in model.named_modules():
            if hasattr(module, "prepare_for_export"):
                try:
                    module.prepare_for_export()
                except (TypeError, ValueError, NotImplementedError, KeyError) as error:
                    reading.unusable[f"{'mtp.' * mtp}{name}"] = f"{type(error).__name__}: {error}"
    return reading


def take(model: Any, tensors: dict[str, Tensor], reading: Reading, *, mtp: bool) -> None:
    """Put into `reading` what the modules of a model hold, under the names of the checkpoint."""
    modules = dict(model.named_modules())
    for name in tensors:
        if name.startswith("mtp.") != mtp or name.endswith(SCALES_OF_WEIGHTS):
            continue
        module, _, kind = name.removeprefix("mtp.").rpartition(".")
        if module not in modules:
            continue
        held = getattr(modules[module], kind, None)
        if kind == "weight" and held is not None:
            held, algorithm = weight(modules[module])
            if algorithm:
                reading.formats[name.removesuffix(".weight")] = algorithm
        if held is not None:
            reading.values[name] = held


def weight(module: Any) -> tuple[Tensor | None, str | None]:
    """Return the weight that a module computes with, and ModelOpt's name of its format."""
    from tensorrt_edgellm.checkpoint.repacking import decode_modelopt_nvfp4
    from tensorrt_edgellm.models import linear

    if isinstance(module, linear.FP8Linear):
        return module.weight.float() * module.weight_scale.half().float(), "FP8"
    if linear.is_nvfp4_linear(module) or linear.is_nvfp4_a16_linear(module):
        decoded = decode_modelopt_nvfp4(module.weight, module.weight_scale, module.weight_scale_2)
        weight_only = linear.is_nvfp4_a16_linear(module)
        return torch.from_numpy(decoded), "W4A16_NVFP4" if weight_only else "NVFP4"
    return (module.weight if module.weight.is_floating_point() else None), None


if __name__ == "__main__":
    main("0.11.0", read)
