"""What train.py trains: the weights that it begins with, their groups, documents, numerics, and the export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from .generated import KEPT_FLOAT32
from .training_program import arguments, failure


def test_weights_depend_on_the_seed_and_the_name_alone(train: Any) -> None:
    def weights(seed: str, *more: str) -> dict[str, torch.Tensor]:
        torch.rand(7)  # what was drawn before does not matter
        given = ["--data", "d", "--out", "o", "--steps", "1", "--seed", seed, *more]
        world = train.world.World(0, 1, torch.device("cpu"))
        model: torch.nn.Module = train.weights.build_model(train.settings.parse_settings("", given), world, None)
        return model.state_dict()

    first, again, other = weights("1"), weights("1"), weights("2")
    assert first.keys() == train.model.Model().state_dict().keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    name = "backbone.layers.0.mixer.in_proj.weight"
    assert first[name].std() == pytest.approx(0.1, rel=0.05)  # initializer_range
    assert not torch.equal(first[name], other[name])
    assert not torch.equal(first["lm_head.weight"], first["backbone.embeddings.weight"])
    heads = {
        rule: weights("1", "--init", rule)["backbone.layers.0.mixer.A_log"] for rule in ("published", "transformers")
    }
    assert torch.equal(heads["published"], first["backbone.layers.0.mixer.A_log"])
    assert torch.equal(heads["transformers"], torch.arange(1.0, 9.0).log())


def test_weights_of_a_checkpoint(train: Any, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Block by block, they are what `load_checkpoint` reads."""
    whole = train.model.Model()
    whole.routers()[0].e_score_correction_bias.uniform_()
    train.checkpoint.save_checkpoint(whole, tmp_path / "released")
    given = ["--data", "d", "--out", "o", "--steps", "1", "--weights", str(tmp_path / "released")]
    world = train.world.World(0, 1, torch.device("cpu"))
    model = train.weights.build_model(train.settings.parse_settings("", given), world, None)
    expected = whole.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    (tmp_path / "released" / "model.safetensors").unlink()
    said = failure(train, capsys, 6, *arguments(text, tmp_path / "out", "--weights", str(tmp_path / "released")))
    assert "has neither model.safetensors nor" in said


def test_groups_of_the_optimizer(train: Any) -> None:
    """Norms, biases, SSM vectors and embeddings do not decay; every parameter is in one group."""
    model = train.model.Model()
    settings = train.settings.parse_settings("", ["--data", "d", "--out", "o", "--steps", "1"])
    groups = train.optimizer.build_optimizer(model, settings).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, others = ({names[id(p)].rpartition("layers.")[2] for p in group["params"]} for group in groups)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert len(decayed) + len(others) == len(names)
    assert {"0.mixer.in_proj.weight", "1.mixer.gate.weight", "1.mixer.experts.up_proj", "lm_head.weight"} <= decayed
    vectors = ("A_log", "D", "dt_bias", "conv1d.bias", "norm.weight")
    assert {f"0.mixer.{name}" for name in vectors} | {"backbone.embeddings.weight", "0.norm.weight"} <= others


def test_document_separator(train: Any, text: Path, tmp_path: Path) -> None:
    """The first loss, and validation, are those of the fresh model with documents."""
    run = arguments(text, tmp_path / "out", "--document-separator", str(ord(" ")), "--val-every", "1", "--steps", "1")
    assert train.train.main(run) == 0
    line = json.loads((tmp_path / "out" / "metrics.jsonl").read_text())
    settings = train.settings.parse_settings("", run)
    model = train.weights.build_model(settings, train.world.World(0, 1, torch.device("cpu")), None)
    windows, held_out = train.data.open_data(settings)
    ids = torch.stack([windows.shuffled(n).ids for n in range(2)])
    documents = train.data.documents_of(ids, ord(" "))
    assert documents.max() > 0
    assert line["loss"] == pytest.approx(model(ids, ids, documents).loss.item(), abs=1e-6)
    assert line["loss"] != pytest.approx(model(ids, ids).loss.item(), abs=1e-4)
    train.checkpoint.load_checkpoint(model, tmp_path / "out" / "export")
    rows = torch.stack([held_out.read(n).ids for n in range(held_out.per_epoch)])
    documents = train.data.documents_of(rows, ord(" "))
    losses = -model(rows, None, documents).logits.log_softmax(-1)[:, :-1].gather(2, rows[:, 1:, None])[..., 0]
    assert line["val_loss"] == pytest.approx(losses[documents[:, 1:] == documents[:, :-1]].mean().item(), abs=1e-5)


def test_bfloat16_gradients_are_summed_in_float32(train: Any, text: Path, tmp_path: Path) -> None:
    """Also those of a weight with several uses, as the head has one for each step of prediction."""
    settings = train.settings.parse_settings("", arguments(text, tmp_path, "--numerics", "bf16"))
    trainer = train.train.Trainer(settings, train.world.World(0, 1, torch.device("cpu")))
    weight, x = torch.randn(8, 8, requires_grad=True), torch.randn(4, 8)
    with trainer.autocast():
        y = sum((x * scale) @ weight for scale in (1.0, 0.3, 0.1))
    assert isinstance(y, torch.Tensor)
    y.square().sum().backward()
    assert weight.grad is not None and not torch.equal(weight.grad, weight.grad.bfloat16().float())


@pytest.mark.slow
def test_compiled_blocks(train: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the three is compiled, once for both steps, and the run is the same."""
    compiled: list[Any] = []
    compile_ = torch.compile

    def note(function: Any) -> Any:
        compiled.append(function)
        return compile_(function)

    monkeypatch.setattr(torch, "compile", note)
    for option in ("--no-compile", "--compile"):
        given = arguments(text, tmp_path / option, "--steps", "3", option)
        assert train.train.main(given) == 0 and len(compiled) == (3 if option == "--compile" else 0)
    eager, ours = (
        [json.loads(line) for line in (tmp_path / option / "metrics.jsonl").read_text().splitlines()]
        for option in ("--no-compile", "--compile")
    )
    assert len(ours) == 3
    for name in ("loss", "balance_loss", "grad_norm"):
        assert [line[name] for line in ours] == pytest.approx([line[name] for line in eager], abs=1e-4)


def test_export_in_bfloat16(train: Any, text: Path, tmp_path: Path) -> None:
    """It may change when a run goes on; what stays float32 in a cast does so in it."""
    run = arguments(text, tmp_path / "out", "--steps", "1")
    assert train.train.main(run) == 0
    path = tmp_path / "out" / "export" / "model.safetensors"
    exact = load_file(path)
    assert train.train.main([*run, "--resume", "--export-dtype", "bfloat16"]) == 0
    for name, tensor in load_file(path).items():
        kind = torch.float32 if name.endswith(KEPT_FLOAT32) else torch.bfloat16
        assert tensor.dtype == kind and torch.equal(tensor, exact[name].to(kind))
