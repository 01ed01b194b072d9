"""vLLM's own models and weight loader. See `reading.py` for how this is run and what it writes.

The wheel's Python files are enough, but they expect a GPU. Replaced, so that models are built on a CPU:

- packages of servers and of constrained decoding, which are imported and not used (`ABSENT`);
- the platform, which vLLM finds by its compiled parts: its own CpuPlatform, which says to experts without a gate
  that it is CUDA;
- looking at a model's class in another process, which would not have these replacements;
- the choice of kernels, which are all compiled for GPUs: none. Loading ends before weights are laid out for one.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from .absent import stand_in_for
from .merged import MergedModel
from .reading import Reading, main, tensors_of

ABSENT = ("llguidance", "openai_harmony", "uvloop", "xgrammar")


def replace_what_needs_a_gpu() -> None:
    """Make vLLM's models constructible on a CPU."""
    stand_in_for(*ABSENT)
    import vllm.platforms
    from vllm.platforms.cpu import CpuPlatform

    vllm.platforms.current_platform = CpuPlatform()

    from vllm.model_executor.layers.fused_moe import config, unquantized_fused_moe_method
    from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend
    from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import NvFp4MoeBackend
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
    from vllm.model_executor.layers.quantization import modelopt
    from vllm.model_executor.models import registry

    config.current_platform = CpuPlatform()
    config.current_platform.is_cuda_alike = lambda: True
    registry._run_in_subprocess = lambda function: function()
    unquantized_fused_moe_method.select_unquantized_moe_backend = lambda **_: (UnquantizedMoeBackend.TRITON, None)
    modelopt.select_fp8_moe_backend = lambda **_: (Fp8MoeBackend.TRITON, None)
    modelopt.select_nvfp4_moe_backend = lambda **_: (NvFp4MoeBackend.EMULATION, None)
    modelopt.select_linear_kernel = lambda *_, **__: None
    modelopt.expose_input_quant_key = lambda *_: None


def read(folder: Path) -> Reading:
    """Return what vLLM's model, and its MTP model where there are such tensors, hold after loading."""
    tensors = tensors_of(folder)
    reading = Reading()
    for mtp in sorted({name.startswith("mtp.") for name in tensors}):
        model, config = build(folder, mtp=mtp)
        MergedModel(model, config.model_config.hf_config, "routed_experts.", algorithm).read(tensors, reading, mtp=mtp)
        if not mtp:
            cache = {layer.kv_cache_dtype for layer in model.modules() if hasattr(layer, "kv_cache_dtype")}
            reading.kv_cache = "FP8" if any("fp8" in str(dtype) for dtype in cache) else None
    return reading


def build(folder: Path, *, mtp: bool) -> tuple[Any, Any]:
    """Return vLLM's model of the checkpoint, or its MTP model, and its config."""
    from vllm.config import DeviceConfig, ModelConfig, SpeculativeConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    given: dict[str, Any] = {}
    model = ModelConfig(str(folder), skip_tokenizer_init=True, dtype="bfloat16", max_model_len=32)
    config = VllmConfig(model_config=model, device_config=DeviceConfig("cpu"))
    with set_current_vllm_config(config):
        if not torch.distributed.is_initialized():
            init_distributed_environment(1, 0, f"file://{tempfile.mkdtemp()}/ranks", 0, "gloo")
            initialize_model_parallel()
    if mtp:
        config.speculative_config = SpeculativeConfig(
            method="mtp",
            num_speculative_tokens=1,
            target_model_config=model,
            target_parallel_config=config.parallel_config,
        )
        given["model_config"] = config.speculative_config.draft_model_config
    with set_default_torch_dtype(torch.bfloat16):
        built = initialize_model(config, **given)
    return built, config


def algorithm(method: Any) -> str | None:
    """Return ModelOpt's name of what a layer's method runs; None: floats."""
    from vllm.model_executor.layers.quantization import modelopt

    match method:
        case modelopt.ModelOptFp8MoEMethod():
            return "FP8"
        case modelopt.ModelOptNvFp4FusedMoE():
            return "W4A16_NVFP4" if method.use_a16 else "NVFP4"
        case modelopt.ModelOptLinearMethod():
            if method.spec.weight == modelopt.kFp8StaticTensorSym:
                return "FP8"
            return "W4A16_NVFP4" if method.spec.activation is None else "NVFP4"
        case _:
            return None


if __name__ == "__main__":
    replace_what_needs_a_gpu()
    main("0.33.0", read)
