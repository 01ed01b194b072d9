"""Checkpoints that other programs wrote: names, experts in one tensor, dropped MTP, and faults told together."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from n3c.backends.safetensors.checkpoint import Checkpoint
from n3c.backends.safetensors.checkpoint_fit import fitting_checkpoint
from n3c.backends.safetensors.imported_spec import import_checkpoint
from n3c.ir.diagnostics import ExitCode, N3CError
from n3c.specs.schema import Spec
from n3c.specs.spellings import released_name
from support.checkpoints import as_bytes, write_checkpoint
from support.command import n3c
from support.specs import small_spec


@pytest.fixture(scope="module")
def spec() -> Spec:
    return small_spec()


@pytest.fixture
def folder(tmp_path: Path, spec: Spec) -> Path:
    write_checkpoint(tmp_path / "hf", spec, shards=1, with_spec=False)
    return tmp_path / "hf"


def rename(folder: Path, change: Callable[[str], str]) -> dict[str, Tensor]:
    """Give the tensors of a checkpoint other names; return them by their old ones."""
    tensors = load_file(folder / "model.safetensors")
    save_file({change(name): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    return tensors


@pytest.mark.parametrize(
    ("found", "released"),
    [
        ("backbone.embedding.weight", "backbone.embeddings.weight"),
        ("model.embeddings.weight", "backbone.embeddings.weight"),
        ("model.layers.3.mixer.q_proj.weight", "backbone.layers.3.mixer.q_proj.weight"),
        ("model.norm_f.weight", "backbone.norm_f.weight"),
        ("module.lm_head.weight", "lm_head.weight"),
        ("_orig_mod.module.model.layers.0.norm.weight", "backbone.layers.0.norm.weight"),
        ("backbone.layers.0._orig_mod.norm.weight", "backbone.layers.0.norm.weight"),
        ("language_model.backbone.layers.0.norm.weight", "backbone.layers.0.norm.weight"),
        ("language_model.mtp.layers.0.eh_proj.weight", "mtp.layers.0.eh_proj.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("model.language_model.layers.0.norm.weight", "backbone.layers.0.norm.weight"),
        ("model.backbone.layers.0.norm.weight", "backbone.layers.0.norm.weight"),
        ("model.mtp.layers.0.eh_proj.weight", "mtp.layers.0.eh_proj.weight"),
        ("module.model.lm_head.weight", "lm_head.weight"),
        ("model.vision_tower.blocks.0.weight", "model.vision_tower.blocks.0.weight"),
        ("backbone.embeddings.weight", "backbone.embeddings.weight"),
        ("backbone.embedding_norm.weight", "backbone.embedding_norm.weight"),
    ],
)
def test_names(found: str, released: str) -> None:
    assert released_name(found) == released
    assert released_name(released) == released


@pytest.mark.parametrize(
    "prefix", ["model.", "model.backbone.", "module.backbone.", "_orig_mod.module.model.", "language_model.model."]
)
def test_every_prefix_is_read(folder: Path, spec: Spec, prefix: str) -> None:
    outer = prefix.removesuffix("backbone.").removesuffix("model.")

    def renamed(name: str) -> str:
        return prefix + name.removeprefix("backbone.") if name.startswith("backbone.") else outer + name

    expected = rename(folder, renamed)
    checkpoint = fitting_checkpoint(spec, folder, unquantized=True)
    assert set(checkpoint) == set(expected)
    name = "backbone.layers.1.mixer.experts.3.up_proj.weight"
    np.testing.assert_array_equal(checkpoint.read(name).astype(np.float32), expected[name].float().numpy())


def fuse(folder: Path, suffix: str) -> dict[str, Tensor]:
    """Stack the experts of each layer, as transformers has them in memory; return the tensors one by one."""
    tensors = load_file(folder / "model.safetensors")
    fused = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for name in tensors:
        if ".experts.0." in name:
            stack = torch.stack([tensors[name.replace(".experts.0.", f".experts.{e}.")] for e in range(8)])
            fused[name.replace(".experts.0.", ".experts.").removesuffix(".weight") + suffix] = stack
    save_file(fused, folder / "model.safetensors")
    return tensors


@pytest.mark.parametrize("suffix", ["", ".weight"])
def test_experts_in_one_tensor_are_read(folder: Path, spec: Spec, tmp_path: Path, suffix: str) -> None:
    expected = fuse(folder, suffix)
    checkpoint = fitting_checkpoint(spec, folder, unquantized=True)
    assert set(checkpoint) == set(expected)
    for name in expected:
        if ".experts." in name:
            np.testing.assert_array_equal(checkpoint.read(name).astype(np.float32), expected[name].float().numpy())
    result = n3c("quantize", "--weights", folder, "-o", tmp_path / "out")
    assert result.code == 0, result.err
    assert "backbone.layers.1.mixer.experts.3.up_proj.weight_scale_2" in load_file(tmp_path / "out/model.safetensors")


def test_square_experts_in_one_tensor_are_refused(tmp_path: Path) -> None:
    save_file({"model.layers.1.mixer.experts.up_proj": torch.zeros(8, 32, 32)}, tmp_path / "model.safetensors")
    with pytest.raises(N3CError) as caught:
        Checkpoint(tmp_path)
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code == "E0620"
    assert "8 experts of [32, 32]" in diagnostic.message
    assert "experts.0.up_proj.weight" in (diagnostic.help or "")


def test_two_names_of_one_tensor_are_refused(tmp_path: Path) -> None:
    names = ("backbone.embeddings.weight", "model.embedding.weight")
    save_file({name: torch.zeros(2, 2) for name in names}, tmp_path / "model.safetensors")
    with pytest.raises(N3CError, match=r"`backbone\.embeddings\.weight` has two names"):
        Checkpoint(tmp_path)


def faults(spec: Spec, folder: Path) -> list[tuple[str, str, str]]:
    with pytest.raises(N3CError) as caught:
        fitting_checkpoint(spec, folder)
    assert caught.value.exit_code is ExitCode.FILE
    return [(found.code, found.message, found.help or "") for found in caught.value.diagnostics]


def test_an_unknown_prefix_is_one_line(folder: Path, spec: Spec) -> None:
    tensors = rename(folder, lambda name: f"base.text.{name}")
    ((code, message, help_),) = faults(spec, folder)
    assert code == "E0608"
    assert message.startswith(f"{len(tensors)} tensors have the prefix `base.text.` before their names")
    assert "language_model." in help_


def test_a_checkpoint_of_another_model_is_a_few_lines(folder: Path, spec: Spec) -> None:
    tensors = rename(folder, lambda name: f"other{name.replace('.', '_')}")
    (missing, strange) = faults(spec, folder)
    assert missing[0] == "E0603"
    assert missing[1].startswith(f"{len(tensors)} tensors are not in the checkpoint: `backbone.embeddings.weight`, ")
    assert missing[1].endswith(f" and {len(tensors) - 3} more")
    assert strange[:2] == ("E0608", strange[1])
    assert strange[1].startswith(f"the spec has no place for {len(tensors)} tensors: `other")


def test_a_few_faults_are_told_one_by_one(folder: Path, spec: Spec) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"], tensors["backbone.norm_f.weight"]
    save_file(tensors, folder / "model.safetensors")
    assert [message for _, message, _ in faults(spec, folder)] == [
        "no tensor `backbone.norm_f.weight` in the checkpoint",
        "no tensor `lm_head.weight` in the checkpoint",
    ]


@pytest.fixture
def without_mtp(folder: Path) -> Path:
    """Return a checkpoint as transformers saves it: the config speaks of MTP, the tensors are dropped."""
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("mtp.")}
    save_file(kept, folder / "model.safetensors")
    return folder


def test_dropped_mtp_gives_a_spec_without_it(without_mtp: Path, tmp_path: Path) -> None:
    imported = n3c("import", without_mtp, "-o", tmp_path / "spec.toml", "--json")
    assert imported.code == 0
    assert "W0304" in imported.codes
    assert "[mtp]" not in (tmp_path / "spec.toml").read_text()
    assert "mtp." not in (tmp_path / "spec.toml").read_text()
    out = tmp_path / "out"
    assert n3c("quantize", tmp_path / "spec.toml", "--weights", without_mtp, "-o", out).code == 0
    again = n3c("quantize", "--weights", without_mtp, "-o", tmp_path / "again", "--json")
    assert again.code == 0, again.err
    assert "W0304" in again.codes
    config = json.loads((out / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 0
    assert not [key for key in config if key.startswith("mtp_")]
    assert import_checkpoint(out).spec.mtp is None
    assert "W0304" not in [warning.code for warning in import_checkpoint(out).warnings]


def test_dropped_mtp_of_a_checkpoint_with_n3cs_own_words(tmp_path: Path) -> None:
    rules = '[[quantization.rules]]\nroles = ["mtp.*"]\nformat = "bf16"\n'
    rules += '[[quantization.rules]]\nroles = ["mtp.*", "lm_head"]\nformat = "bf16"\n'
    table = f'[quantization]\nformat = "nvfp4"\nblock = [1, 16]\n{rules}'
    write_checkpoint(tmp_path / "hf", small_spec(table), shards=1)
    tensors = load_file(tmp_path / "hf/model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("mtp.")}
    save_file(kept, tmp_path / "hf/model.safetensors")
    spec = import_checkpoint(tmp_path / "hf").spec
    assert spec.quantization is not None
    assert [rule.roles for rule in spec.quantization.rules] == [("lm_head",)]


def test_dropped_mtp_that_a_spec_wants_is_one_line(without_mtp: Path, spec: Spec) -> None:
    ((code, message, help_),) = faults(spec, without_mtp)
    assert code == "E0603"
    assert message.startswith("the checkpoint has no `mtp.*` tensors")
    assert help_.startswith("remove [mtp] from the spec")


def test_a_tied_model_gets_its_head(tmp_path: Path) -> None:
    """transformers does not tie: it would make the head up."""
    spec = small_spec(odd=("initializer_range", "tie_word_embeddings = true\ninitializer_range"))
    write_checkpoint(tmp_path / "hf", spec, shards=2)
    result = n3c("quantize", "--weights", tmp_path / "hf", "-o", tmp_path / "out")
    assert result.code == 0, result.err
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(tensors["lm_head.weight"], tensors["backbone.embeddings.weight"])
    made = import_checkpoint(tmp_path / "out").spec
    fitting_checkpoint(made, tmp_path / "out")  # and such a checkpoint is read
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    save_file(tensors, tmp_path / "out/model.safetensors")
    ((code, message, _),) = faults(spec, tmp_path / "out")
    assert (code, message) == (
        "E0608",
        "`lm_head.weight` is not `backbone.embeddings.weight`, though the spec ties them",
    )


def make_multimodal(folder: Path, nested: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Turn a checkpoint into one of several models; return the others' tensors and the config."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file({f"language_model.{name}": t for name, t in tensors.items()}, folder / "model-00001-of-00002.safetensors")
    others = {
        "vision_model.blocks.0.weight": torch.randn(3, 3).to(torch.bfloat16),
        "model.mlp1.0.weight": torch.tensor([torch.nan, -0.0]),
        "sound_encoder.steps": torch.tensor(7),
    }
    save_file(others, folder / "model-00002-of-00002.safetensors")
    weight_map = {f"language_model.{name}": "model-00001-of-00002.safetensors" for name in tensors}
    weight_map |= dict.fromkeys(others, "model-00002-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    outer: dict[str, Any] = {
        "model_type": "NemotronH_Nano_Omni_Reasoning_V3",
        "architectures": ["NemotronH_Nano_Omni_Reasoning_V3"],
        nested: json.loads((folder / "config.json").read_text()),
        "vision_config": {"hidden_size": 3},
        "sound_config": {},
    }
    (folder / "config.json").write_text(json.dumps(outer))
    return others, outer


@pytest.mark.parametrize("nested", ["text_config", "llm_config"])
def test_the_text_model_of_a_multimodal_checkpoint(folder: Path, tmp_path: Path, nested: str) -> None:
    """Omni and VL: its config is nested, its tensors are under `language_model.`, the other models' are left out."""
    expected = n3c("import", folder, "--json").data
    tensors = set(load_file(folder / "model.safetensors"))
    _, outer = make_multimodal(folder, nested)
    text = outer[nested]
    ignored = [f"language_model.backbone.layers.{i}.mixer.experts" for i in (1, 4)]

    imported = n3c("import", folder, "--json")
    assert imported.code == 0, imported.err
    assert imported.data["spec"] == expected["spec"]
    first = imported.data["diagnostics"][0]
    assert first["code"] == "W0305"
    assert (
        first["message"]
        == f"the spec is that of the text model, `{nested}`; not in it: `vision_config`, `sound_config`"
    )
    result = n3c("quantize", "--weights", folder, "-o", tmp_path / "out")
    assert result.code == 0, result.err
    assert "3 tensors of other models (34 bytes) are left out" in result.err
    made = Checkpoint(tmp_path / "out")
    assert {name for name in made if not name.endswith(("_scale", "_scale_2"))} == tensors
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert (written["model_type"], written["architectures"]) == ("nemotron_h", ["NemotronHForCausalLM"])

    quantization = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ignored}
    (folder / "config.json").write_text(json.dumps(outer | {"quantization_config": quantization}))
    spec = import_checkpoint(folder).spec
    assert spec.quantization is not None
    assert spec.quantization.format == "fp8"
    del text["hidden_size"]
    outer[nested] = text | {"vocab_size": "many"}
    (folder / "config.json").write_text(json.dumps(outer, indent=1))
    wrong = n3c("import", folder, "--json")
    (error,) = (found for found in wrong.data["diagnostics"] if found["severity"] == "error")
    assert json.dumps(outer, indent=1).split("\n")[error["line"] - 1].strip() == '"vocab_size": "many",'


def test_a_multimodal_checkpoint_as_a_whole(folder: Path, tmp_path: Path) -> None:
    """Names are those of the source, vision and audio the same bytes, formats are said once and of all."""
    text_alone, source = tmp_path / "text", folder / "config.json"
    assert n3c("quantize", "--weights", folder, "-o", text_alone).code == 0
    refused = n3c("quantize", "--weights", folder, "-o", tmp_path / "out", "--multimodal", "whole", "--json")
    assert (refused.code, refused.codes) == (2, ["E0701"])
    others, outer = make_multimodal(folder, "text_config")
    source.write_text(json.dumps(outer | {"quantization_config": None}))
    result = n3c("quantize", "--weights", folder, "-o", tmp_path / "out", "--multimodal", "whole", "--json")
    assert result.code == 0, result.err
    told = {item["code"]: item["message"] for item in result.data["diagnostics"]}
    assert told["W0625"] == "3 tensors of other models (34 bytes) are carried byte for byte"
    stored = {
        name: tensor for file in (tmp_path / "out").glob("*.safetensors") for name, tensor in load_file(file).items()
    }
    for name, tensor in others.items():
        assert as_bytes(stored.pop(name)) == as_bytes(tensor)
    expected = load_file(text_alone / "model.safetensors")
    assert {name.removeprefix("language_model.") for name in stored} == set(expected)
    assert all(torch.equal(stored[f"language_model.{name}"], tensor) for name, tensor in expected.items())

    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["model_type"], config["vision_config"]) == (outer["model_type"], {"hidden_size": 3})
    assert "quantization_config" not in config["text_config"]
    said = config["quantization_config"]
    assert "vision_model.blocks.0" in said["ignore"]
    assert all(name.startswith(("language_model.", "vision_model.")) for name in said["ignore"])
    assert all(name.startswith("language_model.") for name in said["quantized_layers"])
    again = import_checkpoint(tmp_path / "out").spec
    assert again.quantization == import_checkpoint(text_alone).spec.quantization
    fitting_checkpoint(again, tmp_path / "out")
    del config["text_config"]["n3c"]  # as a reader of ours would find another tool's
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    assert import_checkpoint(tmp_path / "out").spec.quantization is not None
