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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

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
        "recompute.py",
        "routing.py",
        "sequences.py",
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
    torch.testing.assert_close(got.loss, expected.losses[0])
    assert (got.loss - model(IDS, IDS).losses[0]).abs() > 1e-4


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


def native_and_wrapped(folder: Path) -> tuple[Any, Any]:
    return native(folder), wrapped(folder)


def test_base_model_and_hidden_states(saved: tuple[Any, Path]) -> None:
    """Those of transformers' own model: after each block, and after the last norm; embeddings are taken, too."""
    theirs, ours = native_and_wrapped(saved[1])
    assert ours.base_model is ours.backbone and ours.get_input_embeddings() is ours.backbone.embeddings
    assert ours.get_output_embeddings() is ours.lm_head
    with torch.no_grad():
        expected = theirs(IDS, output_hidden_states=True)
        got = ours(IDS, output_hidden_states=True)
        assert len(got.hidden_states) == len(expected.hidden_states) == 9
        for a, b in zip(got.hidden_states, expected.hidden_states, strict=True):
            assert (a - b).abs().max() <= 1e-5
        assert torch.equal(ours.backbone(IDS).last_hidden_state, got.hidden_states[-1])
        embedded = ours.get_input_embeddings()(IDS)
        assert torch.equal(ours(inputs_embeds=embedded).logits, got.logits)
        assert torch.equal(ours(inputs_embeds=embedded, labels=IDS).loss, ours(IDS, labels=IDS).loss)
        assert torch.equal(ours(IDS, logits_to_keep=3).logits, got.logits[:, -3:])
        assert torch.equal(ours(IDS, logits_to_keep=torch.tensor([0, 4])).logits, got.logits[:, [0, 4]])
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        ours(IDS, inputs_embeds=embedded)


def test_loss_by_the_items_of_a_batch(saved: tuple[Any, Path]) -> None:
    """The sum by that number, as transformers' own: parts of a step then add up, with the gradients of MTP."""
    theirs, ours = native_and_wrapped(saved[1])
    expected = theirs(IDS, labels=IDS, num_items_in_batch=50).loss
    assert abs(float((ours(IDS, labels=IDS, num_items_in_batch=torch.tensor(50)).loss - expected).detach())) <= 1e-5
    ours.train()
    ours(IDS, labels=IDS, num_items_in_batch=24).loss.backward()
    whole = {name: parameter.grad.clone() for name, parameter in ours.named_parameters()}
    ours.zero_grad()
    for row in IDS.split(1):
        ours(row, labels=row, num_items_in_batch=24).loss.backward()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("form", ["position_ids", "seq_idx", "cu_seq_lens_q"])
def test_documents_by_what_collators_say(saved: tuple[Any, Path], form: str) -> None:
    _, ours = saved[0], wrapped(saved[1]).train()
    parts = (slice(0, 1), slice(1, 6), slice(6, 13))
    options = {
        "position_ids": torch.cat([torch.arange(n) for n in (1, 5, 7)])[None],
        "seq_idx": torch.tensor([0] + [1] * 5 + [2] * 7)[None],
        "cu_seq_lens_q": torch.tensor([0, 1, 6, 13], dtype=torch.int32),
    }
    out = ours(IDS[:1], labels=IDS[:1], return_logits=True, **{form: options[form]})
    expected = [ours(IDS[:1, part]).logits for part in parts]
    torch.testing.assert_close(out.logits, torch.cat(expected, 1), atol=1e-5, rtol=0)
    packed = saved[0].train()(IDS[:1], IDS[:1], options["seq_idx"], return_logits=False)
    assert torch.equal(out.loss, packed.loss)


def test_a_mask_with_holes_is_no_boundary(saved: tuple[Any, Path]) -> None:
    """Tokens behind a hole see those before it, with labels and without; padding has no loss."""
    ours = wrapped(saved[1])
    mask = torch.ones_like(IDS)
    mask[0, 4:7] = 0
    kept = mask[0].bool()
    with torch.no_grad():
        expected = ours(IDS[:1, kept], labels=IDS[:1, kept])
        got = ours(IDS[:1], attention_mask=mask[:1], labels=IDS[:1])
        torch.testing.assert_close(got.logits[:, kept], expected.logits, atol=1e-5, rtol=0)
        torch.testing.assert_close(got.loss, expected.loss)
        alone = ours(IDS[:1], attention_mask=mask[:1], output_hidden_states=True)
        torch.testing.assert_close(alone.logits[:, kept], expected.logits, atol=1e-5, rtol=0)
        before = ours(IDS[:1, kept], output_hidden_states=True).hidden_states
        for a, b in zip(alone.hidden_states, before, strict=True):
            torch.testing.assert_close(a[:, kept], b, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"shape of attention_mask is \[2, 12\], where"):
        ours(IDS, attention_mask=mask[:, 1:])


def test_embeddings_grow(saved: tuple[Any, Path], tmp_path: Path) -> None:
    """With the head; what was known keeps its logits, and the new tokens are learnt, saved and read."""
    ours = wrapped(saved[1])
    with torch.no_grad():
        expected = ours(IDS).logits
    ours.resize_token_embeddings(101)
    ids = torch.cat([torch.full((2, 1), 100), IDS], 1)
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits[..., :97], expected)
    ours.train()(ids, labels=ids).loss.backward()
    assert ours.get_input_embeddings().weight.grad[100].abs().max() > 0 and ours.lm_head.weight.grad.shape == (101, 64)
    ours.eval().save_pretrained(tmp_path / "grown")
    with torch.no_grad():
        assert torch.equal(wrapped(tmp_path / "grown")(ids).logits, ours(ids).logits)


@pytest.mark.parametrize("replaced", [False, True])
def test_training_never_has_all_logits(saved: tuple[Any, Path], replaced: bool) -> None:
    """Of 600 tokens no tensor is larger than the logits of 256, whatever the head is; all children can be replaced."""
    ours = wrapped(saved[1]).train()
    ours.resize_token_embeddings(4000)
    ids = torch.randint(4000, (1, 600))
    expected = ours(ids, labels=ids, return_logits=True)
    if replaced:

        class Twice(torch.nn.Module):
            def __init__(self, head: torch.nn.Module) -> None:
                super().__init__()
                self.head, self.scale = head, torch.nn.Parameter(torch.ones(()))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                y: torch.Tensor = self.head(x)
                return y * self.scale

        ours.lm_head = Twice(ours.lm_head)
    sizes: list[int] = []
    with Sizes(sizes):
        out = ours(ids, labels=ids)
        out.loss.backward()
    assert max(sizes) <= 257 * 4000
    torch.testing.assert_close(out.loss, expected.loss)
    if replaced:
        assert dict(ours.named_parameters())["lm_head.scale"].grad != 0


class Sizes(TorchDispatchMode):
    """Notes the number of elements of each tensor that is made."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes = sizes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.sizes += [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        return result


def test_expert_names_of_checkpoints_are_read(saved: tuple[Any, Path]) -> None:
    """As Trainer does when it resumes: load_state_dict with what lies on disk, whole or file by file."""
    from safetensors.torch import load_file

    model, folder = saved
    weights = load_file(folder / "model.safetensors")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    fresh = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    assert "backbone.layers.1.mixer.experts.3.up_proj.weight" in weights
    names = sorted(weights)
    result = fresh.load_state_dict({name: weights[name] for name in names}, strict=False)
    assert result.missing_keys == [] and result.unexpected_keys == []
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in fresh.state_dict().items())
    fresh = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    for part in (names[::2], names[1::2]):
        fresh.load_state_dict({name: weights[name] for name in part}, strict=False)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in fresh.state_dict().items())


def test_wrong_arguments(saved: tuple[Any, Path]) -> None:
    ours = wrapped(saved[1])
    labels = IDS.clone()
    labels[0, 3] = 97
    with pytest.raises(ValueError, match="neither -100 nor a token below 97"):
        ours.train()(IDS, labels=labels)
    for name in ("output_attentions", "output_router_logits", "shift_labels"):
        with pytest.raises(ValueError, match=name):
            ours(IDS, **{name: True})
    with pytest.raises(TypeError, match="this model's cache is a StateCache"):
        ours(IDS, past_key_values=DynamicCache())


def test_replay(saved: tuple[Any, Path]) -> None:
    model, folder = saved
    ours = wrapped(folder)
    with torch.no_grad(), ours.recorded_experts() as recording:
        generated = ours.generate(IDS, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    experts = recording.experts()
    assert experts.shape == (2, 18, 3, 3)
    with torch.no_grad():
        expected = model(generated[:, :-1]).logits
        for router in (m for m in ours.modules() if hasattr(m, "e_score_correction_bias")):
            router.e_score_correction_bias.copy_(torch.linspace(-3, 3, 8))
        got = ours(generated[:, :-1], labels=generated[:, :-1], routed_experts=experts).logits
    assert (got - expected).abs().max() <= 1e-5
