"""Activation checkpointing: the same gradients and the same loads, with less kept for the backward pass."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from n3c.specs.blocks import Attention, Mamba
from n3c.specs.schema import Training

from .generated import generate, imported, tiny_spec, write_generated

IDS = torch.randint(97, (2, 40), generator=torch.Generator().manual_seed(5))


def trained_step(model: Any, ids: Tensor = IDS) -> tuple[Any, dict[str, Tensor]]:
    """Return the output of a training step, and each parameter's gradient."""
    model.zero_grad()
    torch.manual_seed(3)
    out = model(ids, ids)
    (out.loss + 0.01 * out.balance_loss).backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters()}


def compare(model: Any) -> None:
    expected, wanted = trained_step(model)
    model.activation_checkpointing_enable()
    out, got = trained_step(model)
    assert torch.equal(out.logits, expected.logits) and torch.equal(out.loss, expected.loss)
    assert torch.equal(out.balance_loss, expected.balance_loss)
    for name, gradient in wanted.items():
        assert torch.equal(got[name], gradient), name
    assert torch.equal(out.tokens_per_expert, expected.tokens_per_expert) and out.tokens_per_expert.sum() > 0


def test_same_bits_and_same_load() -> None:
    torch.manual_seed(0)
    compare(generate(tiny_spec(n_group=2)).Model())


def test_same_bits_with_stochastic_rounding(tmp_path: Path) -> None:
    """Recomputing puts the generator back to where it was, so the gradients round as they would."""
    spec = tiny_spec()
    sizes = replace(spec.model, vocab_size=112), Mamba(16, 16, 16, 2, chunk_size=16), Attention(4, 2, 16)
    spec = replace(spec, model=sizes[0], mamba=sizes[1], attention=sizes[2], training=Training("nvfp4"))
    write_generated(spec, tmp_path)
    with imported(tmp_path) as modules:
        torch.manual_seed(0)
        model = modules.model.Model()
        modules.numerics.emulate(model)
        compare(model)


def kept_bytes(model: Any) -> int:
    """Return the bytes that a forward pass keeps for the backward pass: saved tensors and inputs of blocks."""
    kept: dict[int, Tensor] = {}  # held, so that no memory is used twice

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def keep_input(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        keep(inputs[0])

    hooks = [block.register_forward_pre_hook(keep_input) for block in model.backbone.layers]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(IDS, IDS)
    for hook in hooks:
        hook.remove()
    for parameter in model.state_dict().values():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    assert out.loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_less_is_kept() -> None:
    model = generate(tiny_spec("MEMEM*EM-EME", mtp=None)).Model()
    everything = kept_bytes(model)
    model.activation_checkpointing_enable()
    assert kept_bytes(model) < 0.15 * everything
    model.activation_checkpointing_enable(False)
    assert kept_bytes(model) == everything


def test_kinds_of_blocks() -> None:
    """Only blocks with the named mixers are computed again, in MTP, too."""
    model = generate(tiny_spec("ME*-")).Model()
    model.activation_checkpointing_enable(kinds="moe,attention")
    chosen = {type(block.mixer).__name__: block.gradient_checkpointing for block in model.backbone.layers}
    assert chosen == {"Mamba2": False, "MoE": True, "Attention": True, "MLP": False}
    assert all(block.gradient_checkpointing for block in model.mtp.layers)
    model.activation_checkpointing_enable(False)
    assert not any(block.gradient_checkpointing for block in [*model.backbone.layers, *model.mtp.layers])
    with pytest.raises(ValueError, match="experts is none of mamba2, moe, attention, mlp"):
        model.activation_checkpointing_enable(kinds="experts")


def test_only_training_is_checkpointed() -> None:
    model = generate(tiny_spec("ME", mtp=None)).Model()
    model.activation_checkpointing_enable()
    expected = model(IDS).logits
    assert torch.equal(model.eval()(IDS).logits, expected)
    with torch.no_grad():
        assert torch.equal(model.train()(IDS).logits, expected)
