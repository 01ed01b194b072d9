"""Small checkpoints to quantize, as a directory with config.json and shards."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from n3c.passes.lower.model import lower
from n3c.specs.huggingface import export_config
from n3c.specs.schema import Spec
from support.programs import random_tensors
from support.specs import small_spec

POLICY = """
[quantization]
format = "nvfp4"
block = [16, 16]
[[quantization.rules]]
roles = ["moe.router", "lm_head", "embedding", "mamba.conv1d", "mtp.*", "attention.o_proj"]
format = "bf16"
[[quantization.rules]]
roles = ["mamba.*_proj"]
format = "fp8"
[[quantization.rules]]
roles = ["moe.latent_*", "mamba.in_proj"]
block = [1, 16]
format = "nvfp4"
"""
"""Every format and both blocks; q, k and v share a scale."""


def policy_spec() -> Spec:
    """Return the small spec with `POLICY`."""
    return small_spec(POLICY)


def write_checkpoint(
    folder: Path, spec: Spec, *, shards: int = 3, tensors: Mapping[str, Tensor] | None = None, with_spec: bool = True
) -> dict[str, Tensor]:
    """Write a checkpoint of `spec`, random unless given; without `with_spec` its config is Hugging Face's alone."""
    found = dict(random_tensors(lower(spec)) if tensors is None else tensors)
    folder.mkdir(parents=True)
    config = export_config(spec)
    if not with_spec:
        del config["n3c"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    (folder / "generation_config.json").write_text('{"do_sample": true}', encoding="utf-8")
    names = sorted(found)
    weight_map: dict[str, str] = {}
    for i in range(shards):
        file = "model.safetensors" if shards == 1 else f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        mine = names[i::shards]
        save_file({name: found[name].contiguous() for name in mine}, folder / file)
        weight_map |= dict.fromkeys(mine, file)
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return found


def as_bytes(tensor: Tensor) -> bytes:
    """Return the bytes of a tensor."""
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
