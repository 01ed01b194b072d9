"""Super in a part of its widths, and what its fresh weights do to activations by depth."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from n3c.specs.load import load_spec
from n3c.specs.schema import Spec

from .specs import SPECS

DEPTHS = (0, 1, 2, 4, 8, 16, 32, 64, 88)
"""Blocks after which the residual stream is looked at."""


def cut_super(by: int) -> Spec:
    """Return Super with 1 / `by` of each width, all its blocks, fewer experts and tokens, and no MTP.

    The standard deviation is larger by the root of that, so that a product has its gain of the full width.
    """
    spec = load_spec(SPECS / "super.toml")[0]
    model, mamba, attention, moe = spec.model, spec.mamba, spec.attention, spec.moe
    assert mamba is not None and attention is not None and moe is not None and moe.latent_size is not None
    std = model.initializer_range * math.sqrt(by)
    return replace(
        spec,
        model=replace(model, hidden_size=model.hidden_size // by, vocab_size=4096, initializer_range=std),
        mamba=replace(mamba, num_heads=mamba.num_heads // by, n_groups=1),
        attention=replace(attention, num_heads=attention.num_heads // by),
        moe=replace(
            moe,
            num_experts=16,
            top_k=4,
            intermediate_size=moe.intermediate_size // by,
            shared_intermediate_size=moe.shared_intermediate_size // by,
            latent_size=moe.latent_size // by,
        ),
        mtp=None,
        training=None,
        quantization=None,
    )


def profile(model: Any) -> Tensor:
    """Return root mean squares of the residual stream at DEPTHS and of the logits, and the loss of random tokens."""
    found: list[float] = []

    def look(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if not found:
            found.append(rms(inputs[0]))
        found.append(rms(output[0]))

    for block in model.backbone.layers:
        block.register_forward_hook(look)
    ids = torch.randint(model.config.vocab_size, (2, 128), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = model.eval()(ids, labels=ids)
    return torch.tensor([*(found[depth] for depth in DEPTHS), rms(out.logits), float(out.loss)])


def rows(columns: dict[str, Tensor]) -> str:
    """Return the lines of a table of profiles."""
    titles = [*(f"residual after {depth} blocks" for depth in DEPTHS), "logits", "loss"]
    lines = ["", "| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for title, *numbers in zip(titles, *(column.tolist() for column in columns.values()), strict=True):
        lines.append(f"| {title} | " + " | ".join(f"{number:.4f}" for number in numbers) + " |")
    return "\n".join(lines)


def rms(x: Tensor) -> float:
    return float(x.float().square().mean().sqrt())
