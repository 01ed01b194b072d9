"""ModelOpt as the oracle of calibration: a small transformers model, and what ModelOpt finds for it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from n3c.specs.huggingface import import_config
from n3c.specs.json_places import parse_json
from n3c.specs.schema import Spec
from support.models import small_config, transformers_model


@dataclass(frozen=True, slots=True)
class SavedModel:
    """A transformers model, its checkpoint, and the spec of both."""

    model: Any
    folder: Path
    spec: Spec


def saved_model(folder: Path) -> SavedModel:
    """Write a small model with every kind of block, in float32."""
    config = small_config("MEM*E-", chunk_size=8, routed_scaling_factor=2.5, initializer_range=0.1)
    model = transformers_model(config, 0)
    model.config.architectures = ["NemotronHForCausalLM"]
    model.save_pretrained(folder)
    text = (folder / "config.json").read_text(encoding="utf-8")
    spec, _ = import_config(*parse_json(text, "config.json"), "oracle")
    return SavedModel(model, folder, spec)


def modelopt_scales(model: Any, ids: Tensor, folder: Path, config_name: str) -> dict[str, float]:
    """Return the scales of activations in the checkpoint that ModelOpt exports after its max calibration.

    The KV cache is FP8. Names are those of the checkpoint.
    """
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from safetensors.torch import load_file

    config = copy.deepcopy(getattr(mtq, config_name))
    config["quant_cfg"] = [*config["quant_cfg"], *copy.deepcopy(mtq.FP8_KV_CFG["quant_cfg"])]
    quantized = mtq.quantize(copy.deepcopy(model), config, lambda inner: inner(ids))
    export_hf_checkpoint(quantized, dtype=torch.float32, export_dir=folder)
    tensors = load_file(folder / "model.safetensors")
    kinds = (".input_scale", ".k_scale", ".v_scale")
    return {name: float(tensor) for name, tensor in tensors.items() if name.endswith(kinds)}


def modelopt_scores(model: Any, ids: Tensor) -> dict[str, float]:
    """Return AutoQuantize's score of each of its groups in FP8, which ModelOpt can compute on a CPU."""
    import modelopt.torch.quantization as mtq

    def loss(output: Any, data: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(
            output.logits[:, :-1].flatten(0, 1), data[:, 1:].flatten(), reduction="sum"
        )

    _, state = mtq.auto_quantize(
        copy.deepcopy(model),
        constraints={"effective_bits": 12.0},
        quantization_formats=[mtq.FP8_DEFAULT_CFG],
        data_loader=[ids],
        forward_step=lambda inner, data: inner(data),
        loss_func=loss,
        num_calib_steps=1,
        num_score_steps=1,
        verbose=False,
    )
    return {name.removesuffix(".quant_recipe"): float(s["scores"][0]) for name, s in state["candidate_stats"].items()}
