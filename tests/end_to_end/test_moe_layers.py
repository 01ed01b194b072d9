"""A compressed model, whose MoE blocks differ in width and top-k, from config.json to tokens.

The engines are the ones of every other model; what is shown is that each block has its own sizes in all of them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import NemotronHConfig
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHBlock

from n3c.backends.safetensors.checkpoint import Checkpoint
from n3c.backends.safetensors.checkpoint_fit import fitting_checkpoint
from n3c.backends.torch.emit import emit
from n3c.backends.torch.loading import load_package
from n3c.compiler import export_config, import_config, inspect, quantize
from n3c.ir.diagnostics import N3CError
from n3c.specs.layer_tables import moe_tables
from n3c.specs.load import load_spec
from n3c.specs.schema import Spec
from support.checkpoints import write_checkpoint
from support.command import n3c
from support.models import small_config, transformers_model
from support.specs import LAYERS, QUANTIZED, SMALL, small_spec

SHORT = SMALL.replace('"MEM*E-ME"', '"ME*EE"').replace("[mlp]\nintermediate_size = 96\n", "") + LAYERS
FORMATS = QUANTIZED.replace('roles = ["moe.shared.up"]\nlayers = "last 4"', 'roles = ["moe.shared.up"]')
SIZES = {1: (1, 32, 80), 4: (3, 48, 80), 7: (4, 48, 80), 9: (2, 64, 112)}
"""MoE block of `small_spec(LAYERS)` → top_k, intermediate_size, shared_intermediate_size; 9 is that of MTP."""


def text_of(folder: Path, text: str) -> Path:
    path = folder / "spec.toml"
    path.write_text(text.lstrip(), encoding="utf-8")
    return path


def test_the_sizes_of_each_block_in_counts_code_and_checkpoint(tmp_path: Path) -> None:
    spec = small_spec(LAYERS)
    module = load_package(emit(spec, "0" * 64))
    model = module.Model()
    blocks = dict(enumerate([*model.backbone.layers, *model.mtp.layers]))
    found = {
        index: (block.mixer.gate.config.moe_top_k, block.mixer.experts.up_proj.shape[1], shared.shape[0])
        for index, block in blocks.items()
        if hasattr(block.mixer, "gate")
        for shared in (block.mixer.shared_experts.up_proj.weight,)
    }
    assert found == SIZES
    trunk = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("mtp."))
    unused = sum((8 - SIZES[block][0]) * 2 * SIZES[block][1] * 32 for block in (1, 4, 7))
    counted = inspect(spec).as_json()["parameters"]
    assert (counted["total"], counted["active"]) == (trunk, trunk - unused)

    module.save_checkpoint(model, tmp_path / "saved")
    again = import_config(tmp_path / "saved").spec
    assert (moe_tables(again), again.mtp, again.blocks) == (moe_tables(spec), spec.mtp, spec.blocks)
    other = module.Model()
    module.load_checkpoint(other, tmp_path / "saved")
    assert torch.equal(other.mtp.layers[1].mixer.experts.up_proj, model.mtp.layers[1].mixer.experts.up_proj)


def test_flops_and_bytes_follow_the_layers() -> None:
    usual, differing = (inspect(small_spec(extra)).as_json() for extra in ("", LAYERS))
    routed = {block: 2 * 2 * 32 * top_k * inner for block, (top_k, inner, _) in SIZES.items() if block < 8}
    change = sum(routed.values()) - 3 * 2 * 2 * 32 * 3 * 48
    assert differing["flops_per_token"] - usual["flops_per_token"] == change
    assert differing["decode"]["bytes"]["weights"] - usual["decode"]["bytes"]["weights"] == change


def test_against_transformers_with_a_config_for_each_block(tmp_path: Path) -> None:
    """Its own blocks, each made from the config that the checkpoint's `block_configs` give it."""
    spec = small_spec(LAYERS.partition('[[moe.layers]]\nlayers = "mtp"')[0])
    module = load_package(emit(spec, "0" * 64))
    ours = module.Model().eval()
    export_config(spec, output=tmp_path / "config.json")
    configs = json.loads((tmp_path / "config.json").read_text())["block_configs"]
    theirs = transformers_model(_of_transformers(spec), 0)
    for index, block in enumerate(configs):
        if block.pop("block_type") == "moe":
            theirs.model.layers[index] = NemotronHBlock(_of_transformers(spec, **block), index).eval()
    theirs.set_experts_implementation("eager")
    weights = {name.replace("backbone.", "model."): tensor for name, tensor in ours.state_dict().items()}
    _, unexpected = theirs.load_state_dict(weights, strict=False)
    assert all(name.startswith("mtp.") for name in unexpected)
    ids = torch.randint(97, (2, 13), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        expected = theirs(ids).logits
        assert expected.abs().max() > 0.1
        assert (ours(ids).logits - expected).abs().max() <= 1e-5


def _of_transformers(spec: Spec, **sizes: Any) -> NemotronHConfig:
    assert spec.moe is not None
    moe = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "initializer_range": 0.1}
    return small_config(spec.model.pattern.symbols, **(moe | {"time_step_min": 1e-12} | sizes))


@pytest.mark.parametrize("formats", ["", FORMATS], ids=["bf16", "mixed"])
def test_all_implementations_agree(formats: str, tmp_path: Path) -> None:
    spec, out = text_of(tmp_path, SHORT + formats), tmp_path / "out"
    for target in ("torch", "onnx"):
        assert n3c("build", spec, "--target", target, "-o", out).code == 0
    result = n3c("verify", out, "--json")
    assert result.code == 0, result.err
    found = {row["name"]: row for row in result.data["implementations"]}
    assert {"PyTorch", "PyTorch engine, packed", "ONNX Runtime, float32"} <= found.keys()
    assert all(row["ok"] for row in found.values())
    write_checkpoint(tmp_path / "weights", load_spec(spec)[0])
    (tmp_path / "weights/tokenizer.json").unlink()
    runs = [
        n3c("run", out, "--weights", tmp_path / "weights", "--prompt-ids", "1,2,3", "--engine", engine, "--json")
        for engine in ("onnxruntime", "torch", "reference")
    ]
    assert [run.code for run in runs] == [0, 0, 0], runs[0].err
    assert len({tuple(run.data["token_ids"]) for run in runs}) == 1
    assert len({run.data["acceptance_length"] for run in runs}) == 1


def test_quantized_checkpoints(tmp_path: Path) -> None:
    """Experts of every width are packed, the config keeps the layers, and the checkpoint is read as what it is."""
    text = SHORT + FORMATS
    spec = load_spec(text_of(tmp_path, text))[0]
    write_checkpoint(tmp_path / "weights", spec)
    quantize(weights=tmp_path / "weights", output=tmp_path / "out", spec=spec)
    checkpoint = Checkpoint(tmp_path / "out")
    for layer, width in ((1, 32), (3, 48)):
        assert checkpoint.info(f"backbone.layers.{layer}.mixer.experts.7.down_proj.weight")[1] == (32, width // 2)
    assert import_config(tmp_path / "out").spec.moe == spec.moe
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("weights", "out"))
    assert after["model_type"] == "nemotron_h_puzzle"
    for name in ("block_configs", "mtp_block_configs"):  # other readers know no n3c
        assert after[name] == before[name]


def test_a_checkpoint_fits_whatever_entries_say_its_sizes(tmp_path: Path) -> None:
    """What counts is what each block has: the config of others has no entries at all."""
    spec = load_spec(text_of(tmp_path, SHORT))[0]
    write_checkpoint(tmp_path / "weights", spec, with_spec=False)
    fitting_checkpoint(spec, tmp_path / "weights")
    fitting_checkpoint(import_config(tmp_path / "weights").spec, tmp_path / "weights")
    turned = SHORT.replace("top_k = 3", "top_k = 4").replace(
        '[[moe.layers]]\nlayers = "last 1"\ntop_k = 4', '[[moe.layers]]\nlayers = "3"\ntop_k = 3'
    )
    fitting_checkpoint(load_spec(text_of(tmp_path, turned))[0], tmp_path / "weights")
    other = load_spec(text_of(tmp_path, SHORT.replace("top_k = 4", "top_k = 2")))[0]
    with pytest.raises(N3CError) as caught:
        fitting_checkpoint(other, tmp_path / "weights")
    (found,) = caught.value.diagnostics
    assert (found.code, found.message) == ("E0809", "the checkpoint's config says moe.top_k = 4, the spec 2")


def test_plans_and_their_audit(tmp_path: Path) -> None:
    spec, out = text_of(tmp_path, SHORT + FORMATS), tmp_path / "out"
    overrides = ("--set", "serving.batch_sizes=[1]", "--set", "serving.draft_tokens=0")
    for entry in ("decode", "prefill"):
        result = n3c("build", spec, "--target", "trt", "--entry", entry, "-o", out, *overrides)
        assert result.code == 0, result.err
        assert json.loads((out / "trt" / "audit.json").read_text())["summary"]["mismatches"] == 0


def test_other_trainers(tmp_path: Path) -> None:
    """Megatron-Bridge's provider has one size for all MoE layers; the wrapper's config class has, too."""
    spec, out = text_of(tmp_path, SHORT), tmp_path / "out"
    result = n3c("build", spec, "--target", "torch", "-o", out)
    assert result.code == 0
    assert "moe.layers" in result.err
    written = {path.name for path in (out / "torch").rglob("*.py")}
    assert "torchtitan_adapter.py" in written
    assert written.isdisjoint({"megatron_provider.py", "megatron_recipe.py", "modeling_n3c.py"})
