"""The generated model against transformers' NemotronHForCausalLM, an independent implementation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import NemotronHForCausalLM

from n3c.specs.convert import run_import
from support.models import random_config, transformers_model

from .generated import generate

TOLERANCE = 1e-5
SEEDS = range(20)


def pair(seed: int, folder: Path) -> tuple[Any, Any, Any]:
    """Return transformers' model, the generated module and the generated model, with equal weights.

    The way of a user: a checkpoint that transformers saved → import → generate → load.
    """
    config = random_config(seed)
    theirs = transformers_model(config, seed)
    theirs.save_pretrained(folder / "checkpoint")
    module = generate(run_import(folder / "checkpoint").spec)
    ours = module.Model()
    module.load_checkpoint(ours, folder / "checkpoint")
    return theirs, module, ours.eval()


def tokens(model: Any, batch: int, length: int) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("seed", SEEDS)
def test_logits(seed: int, tmp_path: Path) -> None:
    """Whole sequences, token by token, and in chunks."""
    theirs, _, ours = pair(seed, tmp_path)
    ids = tokens(ours, 2, 13)
    with torch.no_grad():
        expected = theirs(ids).logits
        whole = ours(ids).logits
    assert whole.dtype == torch.float32 and expected.abs().max() > 0.1
    assert (whole - expected).abs().max() <= TOLERANCE

    state = ours.allocate_state(2, 13)
    stepped = torch.cat([ours.step(ids[:, t : t + 1], state) for t in range(13)], dim=1)
    assert (stepped - expected).abs().max() <= TOLERANCE
    assert state.lengths.tolist() == [13, 13]

    state = ours.allocate_state(2, 20)
    chunked = torch.cat([ours.step(chunk, state) for chunk in ids.split([5, 1, 7], dim=1)], dim=1)
    assert (chunked - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("seed", SEEDS)
def test_loss_and_gradients(seed: int, tmp_path: Path) -> None:
    """The largest error of a gradient is at most 1e-4 of its largest entry.

    Where that is next to nothing (of a router's weight, if one expert is chosen and its weight is 1), what counts is
    the noise of float32 beside the largest gradient of all.
    """
    theirs, _, ours = pair(seed, tmp_path)
    ids = tokens(ours, 3, 19)
    labels = ids.clone()
    labels[0, :7] = -100
    expected = theirs(ids, labels=labels).loss
    loss = ours(ids, labels=labels).loss
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    expected.backward()
    loss.backward()
    gradients = {name.replace("model.", "backbone.", 1): p.grad for name, p in theirs.named_parameters()}
    assert gradients.keys() == {name for name, _ in ours.named_parameters()}
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, parameter in ours.named_parameters():
        expected = gradients[name]
        error = float((parameter.grad - expected).abs().max())
        assert error <= 1e-4 * float(expected.abs().max()) + 1e-7 * largest, name


@pytest.mark.parametrize("seed", SEEDS[:3])
def test_transformers_reads_what_we_save(seed: int, tmp_path: Path) -> None:
    _, module, ours = pair(seed, tmp_path)
    module.save_checkpoint(ours, tmp_path / "saved")
    theirs = NemotronHForCausalLM.from_pretrained(tmp_path / "saved", experts_implementation="eager").eval()
    assert theirs.dtype == torch.float32
    ids = tokens(ours, 2, 11)
    with torch.no_grad():
        assert (theirs(ids).logits - ours(ids).logits).abs().max() <= TOLERANCE


def test_random_configs_cover_the_variants() -> None:
    configs = [random_config(seed) for seed in SEEDS]
    assert {c.moe_latent_size is None for c in configs} == {True, False}
    assert {c.n_group > 1 for c in configs} == {True, False}
    assert {c.use_conv_bias for c in configs} == {True, False}
    assert {c.norm_topk_prob for c in configs} == {True, False}
    assert any("mlp" in (c.layers_block_type or []) for c in configs)
    assert any(c.hidden_size % 2 for c in configs)
