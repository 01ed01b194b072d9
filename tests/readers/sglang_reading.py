"""SGLang's own models and weight loader. See `reading.py` for how this is run and what it writes.

Replaced, so that models are built on a CPU:

- packages of servers, and all kernels (`ABSENT`): Triton's, and those that are compiled when first called;
- `torch.compile` and the registration of operators, which look into the kernels;
- the platform, which for NVFP4 experts must be a Blackwell GPU.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from .absent import stand_in_for
from .merged import MergedModel
from .reading import Reading, main, tensors_of

ABSENT = ("IPython", "sglang.kernels.jit", "sglang.kernels.ops", "torchvision", "triton", "uvicorn")


def replace_what_needs_a_gpu() -> None:
    """Make SGLang's models constructible on a CPU."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    # What asks whether torchvision and Triton are installed must have the answer before they seem to be.
    import torch._dynamo
    import torch._inductor  # noqa: F401
    import transformers.models.auto.image_processing_auto  # noqa: F401

    stand_in_for(*ABSENT)
    from sglang.srt.utils import custom_op

    custom_op.register_custom_op = lambda function=None, **_: function or (lambda wrapped: wrapped)

    from sglang.srt.layers.quantization import modelopt_quant

    modelopt_quant.get_platform = lambda: SimpleNamespace(is_blackwell=True)


def read(folder: Path) -> Reading:
    """Return what SGLang's model, and its MTP model where there are such tensors, hold after loading."""
    tensors = tensors_of(folder)
    reading = Reading()
    for mtp in sorted({name.startswith("mtp.") for name in tensors}):
        model, config = build(folder, mtp=mtp)
        MergedModel(model, config.hf_config, "", algorithm).read(tensors, reading, mtp=mtp)
    return reading


def build(folder: Path, *, mtp: bool) -> tuple[Any, Any]:
    """Return SGLang's model of the checkpoint, or its MTP model, and its config."""
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.distributed.parallel_state import init_distributed_environment, initialize_model_parallel
    from sglang.srt.layers.dp_attention import initialize_dp_attention
    from sglang.srt.model_loader import loader
    from sglang.srt.model_loader.utils import set_default_torch_dtype
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import ServerArgs

    arguments = ServerArgs(str(folder), device="cpu", disable_radix_cache=True, attention_backend="torch_native")
    publish(arguments, role="scheduler", ranks=SpawnRanks(world_rank=0, dp_rank=0, gpu_id=0))
    if not torch.distributed.is_initialized():
        place = f"file://{tempfile.mkdtemp()}/ranks"
        init_distributed_environment(1, 0, place, local_rank=0, backend="gloo")
        initialize_model_parallel()
        initialize_dp_attention(arguments)
    config = ModelConfig(str(folder), is_draft_model=mtp)
    load_config = LoadConfig()
    quantization = loader._get_quantization_config(config, load_config)
    with set_default_torch_dtype(torch.bfloat16):
        model = loader._initialize_model(config, load_config, quantization)
    return model, config


def algorithm(method: Any) -> str | None:
    """Return ModelOpt's name of what a layer's method runs; None: floats."""
    from sglang.srt.layers.quantization import modelopt_quant

    match method:
        case modelopt_quant.ModelOptFp8LinearMethod() | modelopt_quant.ModelOptFp8MoEMethod():
            return "FP8"
        case modelopt_quant.ModelOptNvFp4A16LinearMethod():
            return "W4A16_NVFP4"
        case modelopt_quant.ModelOptFp4LinearMethod() | modelopt_quant.ModelOptNvFp4FusedMoEMethod():
            return "NVFP4"
        case _:
            return None


if __name__ == "__main__":
    replace_what_needs_a_gpu()
    main("0.5.23", read)
