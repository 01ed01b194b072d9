"""What save_checkpoint writes, read by transformers: its own nemotron_h, and the emitted wrapper with MTP."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from n3c.specs.convert import run_import

from .generated import tiny_spec
from .hugging_face import IDS, build, greedy, native, remote_code, trained, wrapped


@pytest.fixture(autouse=True, scope="module")
def modules_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with remote_code(tmp_path_factory.mktemp("modules")):
        yield


@pytest.fixture
def module(tmp_path: Path) -> Any:
    return build(tiny_spec(), tmp_path / "torch")


@pytest.fixture
def saved(module: Any, tmp_path: Path) -> tuple[Any, Path]:
    model = trained(module)
    module.save_checkpoint(model, tmp_path / "saved")
    return model, tmp_path / "saved"


def test_transformers_own_nemotron_h(saved: tuple[Any, Path]) -> None:
    """Without trust_remote_code: equal logits, whole and cached, though dt is below the fresh minimum."""
    model, folder = saved
    theirs = native(folder)
    with torch.no_grad():
        expected = model(IDS).logits
        assert (theirs(IDS).logits - expected).abs().max() <= 1e-5
        got = theirs.generate(IDS, max_new_tokens=6, do_sample=False, eos_token_id=None)
        assert torch.equal(got, greedy(model, IDS, 6))
        for block in theirs.model.layers:
            if hasattr(block.mixer, "time_step_limit"):
                block.mixer.time_step_limit = (1e-3, float("inf"))  # what the key of fresh weights would do
        assert (theirs(IDS).logits - expected).abs().max() > 1e-3


def test_the_spec_comes_back(saved: tuple[Any, Path]) -> None:
    config = json.loads((saved[1] / "config.json").read_text())
    assert config["time_step_min"] == 1e-12 and config["n3c"]["time_step_min"] == 1e-3
    assert run_import(saved[1]).spec.mamba == tiny_spec().mamba


def test_wrapper(saved: tuple[Any, Path]) -> None:
    model, folder = saved
    assert sorted(path.name for path in folder.iterdir()) == [
        "activation.py",
        "attention.py",
        "autocast.py",
        "balance.py",
        "callbacks.py",
        "config.json",
        "convolution.py",
        "dispatch.py",
        "float32.py",
        "grouped.py",
        "loss.py",
        "model.py",
        "model.safetensors",
        "modeling_n3c.py",
        "norm.py",
        "padding.py",
        "recompute.py",
        "routing.py",
        "ssd.py",
        "state.py",
    ]
    assert AutoConfig.from_pretrained(folder, trust_remote_code=True).mtp_num_layers == 2
    theirs = wrapped(folder)
    assert type(theirs).__name__ == "N3CForCausalLM"
    assert theirs.state_dict().keys() == model.state_dict().keys()
    labels = IDS.clone()
    labels[0, :4] = -100
    with torch.no_grad():
        expected = model(IDS, labels)
        got = theirs(IDS, labels=labels)
    assert torch.equal(got.logits, expected.logits) and got.past_key_values is None
    assert torch.equal(got.loss, expected.losses[0]) and got.mtp_loss is None  # which eval_loss is without
    as_tuple = theirs(IDS, labels=labels, return_dict=False)
    assert torch.equal(as_tuple[0], expected.losses[0])
    got, expected = theirs.train()(IDS, labels=labels), model.train()(IDS, labels, return_logits=False)
    assert got.logits is None and theirs(IDS, labels=labels, return_logits=True).logits.shape == (2, 13, 97)
    assert torch.equal(got.loss, expected.loss) and torch.equal(got.mtp_loss, expected.mtp_loss)


def test_generate(saved: tuple[Any, Path]) -> None:
    model, folder = saved
    theirs = wrapped(folder)
    options: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = greedy(model, IDS, 9)
    assert torch.equal(theirs.generate(IDS, **options), expected)
    assert torch.equal(theirs.generate(IDS, use_cache=False, **options), expected)
    first = theirs.generate(IDS, **(options | {"max_new_tokens": 4}), return_dict_in_generate=True)
    # transformers 5.24 calls the cache `cache`, and still takes its former name from callers
    for name in {"past_key_values", "cache" if "cache" in first else "past_key_values"}:
        continued = {**options, "max_new_tokens": 5, name: copy.deepcopy(first[name])}
        assert torch.equal(theirs.generate(first.sequences, **continued), expected)
    beams = theirs.generate(IDS, num_beams=3, **options)
    assert torch.equal(beams, theirs.generate(IDS, num_beams=3, use_cache=False, **options))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(saved: tuple[Any, Path], side: str) -> None:
    """A row of a padded batch gives what it gives alone."""
    model, folder = saved
    theirs = wrapped(folder)
    mask = torch.ones_like(IDS)
    pad = slice(0, 5) if side == "left" else slice(8, 13)
    mask[1, pad] = 0
    short = IDS[1:, 5:] if side == "left" else IDS[1:, :8]
    ids = torch.cat([IDS[:1], IDS[1:].masked_fill(mask[1:] == 0, 3)])
    with torch.no_grad():
        whole = theirs(ids, attention_mask=mask).logits
        cached = theirs(ids, attention_mask=mask, use_cache=True).logits
        expected = model(IDS[:1]).logits, model(short).logits
    for logits in (whole, cached):
        torch.testing.assert_close(logits[:1], expected[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(logits[1:, mask[1].bool()], expected[1], atol=1e-5, rtol=0)
    if side == "left":
        options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 3}
        got = theirs.generate(ids, attention_mask=mask, **options)
        assert torch.equal(got[0], greedy(model, IDS[:1], 5)[0])
        assert torch.equal(got[1, 5:], greedy(model, short, 5)[0])


def test_packed_documents(saved: tuple[Any, Path]) -> None:
    model, folder = saved
    documents = (torch.arange(13) >= 6).long().expand(2, -1)
    theirs = wrapped(folder)
    with torch.no_grad():
        expected = model(IDS, IDS, documents)
        got = theirs(IDS, labels=IDS, seq_idx=documents)
    assert torch.equal(got.loss, expected.losses[0]) and not torch.equal(got.loss, model(IDS, IDS).losses[0])


def test_save_pretrained(saved: tuple[Any, Path], module: Any, tmp_path: Path) -> None:
    """What the wrapper saves has the released names: for itself, for model.py and for transformers' own code."""
    model, folder = saved
    wrapped(folder).save_pretrained(tmp_path / "again")
    copy = module.Model().eval()
    module.load_checkpoint(copy, tmp_path / "again")
    for name, tensor in copy.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    theirs = native(tmp_path / "again")
    with torch.no_grad():
        expected = model(IDS).logits
        assert torch.equal(wrapped(tmp_path / "again")(IDS).logits, expected)
        assert (theirs(IDS).logits - expected).abs().max() <= 1e-5


def test_in_training(saved: tuple[Any, Path]) -> None:
    """Gradients with and without transformers' activation checkpointing; bfloat16 keeps the router's bias."""
    model, folder = saved
    theirs = wrapped(folder).train()
    model.train()(IDS, IDS, return_logits=False).loss.backward()
    # the name that it had before transformers 5.23
    enable = getattr(theirs, "activation_checkpointing_enable", None) or theirs.gradient_checkpointing_enable
    enable()
    assert all(block.gradient_checkpointing for block in (*theirs.backbone.layers, *theirs.mtp.layers))
    out = theirs(IDS, labels=IDS)
    out.loss.backward()
    assert out.balance_loss > 0 and out.tokens_per_expert.sum(1).tolist() == [2 * 13 * 3] * 3 + [2 * (12 + 11) * 3]
    for name, parameter in model.named_parameters():
        assert torch.equal(theirs.get_parameter(name).grad, parameter.grad), name
    half = wrapped(folder, dtype=torch.bfloat16)
    gate = half.backbone.layers[1].mixer.gate
    assert gate.weight.dtype == torch.bfloat16 and gate.e_score_correction_bias.dtype == torch.float32


def test_fresh_and_incomplete_weights(saved: tuple[Any, Path], module: Any) -> None:
    """Where weights are missing, they are fresh ones."""
    from safetensors.torch import load_file, save_file

    _, folder = saved
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    fresh = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    dt = torch.nn.functional.softplus(fresh.backbone.layers[0].mixer.dt_bias)
    assert dt.min() > 0.0009 and dt.max() < 0.11
    weights = load_file(folder / "model.safetensors")
    save_file(
        {n: t for n, t in weights.items() if not n.startswith("mtp.")}, folder / "model.safetensors", {"format": "pt"}
    )
    theirs = wrapped(folder)
    assert torch.equal(theirs.lm_head.weight, weights["lm_head.weight"])
    assert torch.equal(theirs.mtp.layers[0].enorm.weight, torch.ones(64))
    assert 0.05 < theirs.mtp.layers[1].mixer.experts.up_proj.std() < 0.15


@pytest.mark.parametrize("kind", ["unshared", "tied", "attention"])
def test_other_specs(kind: str, tmp_path: Path) -> None:
    """No shared expert, which transformers cannot say; tied embeddings; blocks without a Mamba state."""
    spec = {
        "unshared": tiny_spec("ME*", mtp=None, shared_intermediate_size=0),
        "tied": replace(tiny_spec(), model=replace(tiny_spec().model, tie_word_embeddings=True)),
        "attention": tiny_spec("*-E", mtp="-E", latent_size=None),
    }[kind]
    module = build(spec, tmp_path / "torch")
    model = trained(module)
    module.save_checkpoint(model, tmp_path / "saved")
    module.save_checkpoint(model, tmp_path / "saved")  # over its own code, too
    theirs = wrapped(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(theirs(IDS).logits, model(IDS).logits)
    got = theirs.generate(IDS, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(got, greedy(model, IDS, 5))


def test_no_wrapper_where_transformers_has_it_all(tmp_path: Path) -> None:
    module = build(tiny_spec(mtp=None), tmp_path / "torch")
    assert not (tmp_path / "torch/tiny_test/modeling_n3c.py").exists()
    module.save_checkpoint(module.Model(), tmp_path / "saved")
    assert "auto_map" not in json.loads((tmp_path / "saved" / "config.json").read_text())
