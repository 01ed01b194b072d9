"""Checkpoints of any size with true shapes and random weights, written as fast as the disk takes them."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from n3c.backends.safetensors.header import header_bytes, stored_bytes
from n3c.ir.source import Stack, tensor_names
from n3c.passes.lower.model import lower
from n3c.specs.huggingface import export_config
from n3c.specs.load import load_spec

NANO = Path(__file__).parents[1] / "specs" / "nano.toml"
SHARD_BYTES = 4_000_000_000


def write_checkpoint(folder: Path, pattern: str, experts: int = 128) -> int:
    """Write a checkpoint with Nano's layers in the order of `pattern`; return the bytes of its tensors.

    The weights are a window into one random buffer, at another place for each: noise to a quantizer.
    """
    overrides = [f"model.pattern={pattern}", f"moe.num_experts={experts}", f"moe.top_k={min(6, experts)}"]
    spec, _ = load_spec(NANO, overrides)
    shapes = {
        name: parameter.type.static_dims[1 if isinstance(parameter.source, Stack) else 0 :]
        for parameter in lower(spec).parameters.values()
        for name in tensor_names(parameter.source)
    }
    folder.mkdir()
    config = export_config(spec)
    del config["n3c"]
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    noise = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    random = noise.view(torch.uint8).numpy().data
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    room = SHARD_BYTES
    for name, shape in shapes.items():
        size = stored_bytes("BF16", shape)
        if size > room and shards[-1]:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = shape
        room -= size
    weight_map: dict[str, str] = {}
    at = total = 0
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with (folder / file).open("wb") as stream:
            stream.write(header_bytes({name: ("BF16", shape) for name, shape in shard.items()}))
            for name, shape in shard.items():
                left = stored_bytes("BF16", shape)
                total += left
                while left:
                    piece = random[at : at + left]
                    stream.write(piece)
                    left -= len(piece)
                    at = (at + len(piece) + 34) % len(random) // 2 * 2
                weight_map[name] = file
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total
