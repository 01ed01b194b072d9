"""Quantized checkpoints elsewhere: ModelOpt's own export, generated PyTorch, `n3c build --weights`, `n3c inspect`."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import NemotronHConfig

from n3c.backends.safetensors import nvfp4
from n3c.backends.safetensors.checkpoint import Checkpoint
from n3c.backends.torch.emit import emit
from n3c.specs.convert import run_import
from n3c.specs.load import load_spec
from support.checkpoints import as_bytes, policy_spec, write_checkpoint
from support.command import n3c
from support.models import transformers_model
from support.modules import import_file

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint

SAME_LAYERS = """
[quantization]
format = "nvfp4"
block = [1, 16]
[[quantization.rules]]
roles = ["embedding", "lm_head", "moe.router", "mamba.conv1d"]
format = "bf16"
[[quantization.rules]]
roles = ["mamba.out_proj"]
format = "fp8"
"""
"""What NVFP4_DEFAULT_CFG quantizes of a nemotron_h, with out_proj in FP8."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a BF16 checkpoint of transformers, and ModelOpt's own export of the same weights."""
    folder = tmp_path_factory.mktemp("modelopt")
    config = NemotronHConfig(
        vocab_size=64,
        hidden_size=64,
        layers_block_type=["linear_attention", "moe", "full_attention", "mlp"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=96,
        mamba_num_heads=8,
        mamba_head_dim=16,
        ssm_state_size=16,
        n_groups=2,
        chunk_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        moe_shared_expert_intermediate_size=80,
        moe_latent_size=32,
    )
    model: Any = transformers_model(config, 0).to(torch.bfloat16)
    model.config.architectures = ["NemotronHForCausalLM"]
    model.save_pretrained(folder / "bf16")
    chosen = copy.deepcopy(mtq.NVFP4_DEFAULT_CFG)
    for quantizer in ("weight", "input"):
        rule = {"quantizer_name": f"*mixer.out_proj*{quantizer}_quantizer", "cfg": {"num_bits": (4, 3)}}
        chosen["quant_cfg"].append(rule)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mtq.quantize(model, chosen, lambda m: m(torch.arange(32).reshape(2, 16)))
        export_hf_checkpoint(model, dtype=torch.bfloat16, export_dir=folder / "modelopt")
    return folder / "bf16", folder / "modelopt"


def test_every_byte_is_that_of_modelopts_export(exported: tuple[Path, Path], tmp_path: Path) -> None:
    source, theirs = exported
    spec = run_import(source)
    text = spec.text[: spec.text.index("[quantization]")] + SAME_LAYERS
    (tmp_path / "spec.toml").write_text(text)
    assert n3c("quantize", tmp_path / "spec.toml", "--weights", source, "-o", tmp_path / "out").code == 0
    ours, expected = load_file(tmp_path / "out/model.safetensors"), load_file(theirs / "model.safetensors")
    assert set(ours) == {name for name in expected if not name.endswith(".input_scale")}
    assert sum(tensor.dtype is torch.uint8 for tensor in ours.values()) == 19
    for name, tensor in ours.items():
        assert tensor.dtype is expected[name].dtype, name
        assert tensor.shape == expected[name].shape, name
        assert as_bytes(tensor) == as_bytes(expected[name]), name


def test_both_configs_say_what_the_tensors_are(exported: tuple[Path, Path], tmp_path: Path) -> None:
    assert n3c("quantize", "--fmt", "nvfp4", "--weights", exported[0], "-o", tmp_path / "out").code == 0
    config = json.loads((tmp_path / "out/config.json").read_text())
    hf = json.loads((tmp_path / "out/hf_quant_config.json").read_text())["quantization"]
    assert config["hybrid_override_pattern"] == "ME*-"
    assert config["layers_block_type"] == ["linear_attention", "moe", "full_attention", "mlp"]
    assert config["num_hidden_layers"] == 4
    assert config["quantization_config"]["quant_method"] == "modelopt"
    assert hf["quant_algo"] == config["quantization_config"]["quant_algo"] == "MIXED_PRECISION"
    assert hf["quantized_layers"] == config["quantization_config"]["quantized_layers"]
    checkpoint = Checkpoint(tmp_path / "out")
    algorithms = {"U8": "W4A16_NVFP4", "F8_E4M3": "FP8"}
    held = {
        name.removesuffix(".weight"): algorithms[checkpoint.info(name)[0]]
        for name in checkpoint
        if name.endswith(".weight") and checkpoint.info(name)[0] in algorithms
    }
    assert {name: entry["quant_algo"] for name, entry in hf["quantized_layers"].items()} == held
    assert "backbone.layers.1.mixer.experts.3.up_proj" in held
    left_out = config["quantization_config"]["ignore"]
    assert {"lm_head", "backbone.layers.2.mixer.q_proj", "backbone.layers.0.mixer.conv1d"} <= set(left_out)
    assert not set(left_out) & set(held)
    again = run_import(tmp_path / "out").spec
    assert again.quantization is not None
    assert again.quantization.format == "w4a16_nvfp4"


def test_one_format_is_written_with_what_it_leaves_out(exported: tuple[Path, Path], tmp_path: Path) -> None:
    spec = tmp_path / "spec.toml"
    text = run_import(exported[0]).text
    rules = SAME_LAYERS.replace(
        'roles = ["mamba.out_proj"]\nformat = "fp8"', 'roles = ["attention.*"]\nformat = "bf16"'
    )
    spec.write_text(text[: text.index("[quantization]")] + rules)
    assert n3c("quantize", spec, "--weights", exported[0], "-o", tmp_path / "out").code == 0
    said = json.loads((tmp_path / "out/hf_quant_config.json").read_text())
    assert said["quantization"] == {
        "quant_algo": "W4A16_NVFP4",
        "kv_cache_quant_algo": None,
        "group_size": 16,
        "exclude_modules": [
            "backbone.layers.0.mixer.conv1d",
            *(f"backbone.layers.2.mixer.{name}_proj" for name in "koqv"),
            "lm_head",
        ],
    }
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    weights = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    assert config["config_groups"] == {"group_0": {"weights": weights, "targets": ["Linear"]}}
    del config["producer"]
    (tmp_path / "out/config.json").write_text(json.dumps({"quantization_config": config}))


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized")
    write_checkpoint(folder / "source", policy_spec())
    assert n3c("quantize", "--weights", folder / "source", "-o", folder / "out", "--max-shard-size", "100kb").code == 0
    assert n3c("import", folder / "out", "-o", folder / "spec.toml").code == 0
    return folder


def test_the_generated_model_loads_it_dequantized(quantized: Path, tmp_path: Path) -> None:
    for name, text in emit(policy_spec(), "0" * 64).items():
        (tmp_path / name).write_text(text)
    module = import_file(tmp_path / "model.py")
    model = module.Model()
    module.load_checkpoint(model, quantized / "out")
    tensors, checkpoint = module.named_tensors(model), Checkpoint(quantized / "out")
    four = eight = 0
    for name, tensor in tensors.items():
        stored = checkpoint.read(name)
        if stored.dtype == np.uint8:
            scale, scale_2 = checkpoint.read(f"{name}_scale"), np.float32(checkpoint.read(f"{name}_scale_2"))
            expected = nvfp4.dequantize(nvfp4.Nvfp4Matrix(stored.view(np.uint8), scale, scale_2))
            four += 1
        elif f"{name}_scale" in checkpoint:
            expected = stored.astype(np.float32) * checkpoint.read(f"{name}_scale").astype(np.float32)
            eight += 1
        else:
            expected = stored.astype(np.float32)
        assert torch.equal(tensor, torch.from_numpy(expected).to(tensor.dtype)), name
    assert four > 50
    assert eight == 3
    for dtype in (torch.bfloat16,):
        other = module.Model().to(dtype)
        module.load_checkpoint(other, quantized / "out")
        found = module.named_tensors(other)
        name = "backbone.layers.1.mixer.experts.5.up_proj.weight"
        assert torch.equal(found[name], tensors[name].to(dtype))


def test_the_generated_model_names_scales_that_are_missing(quantized: Path, tmp_path: Path) -> None:
    for name, text in emit(policy_spec(), "0" * 64).items():
        (tmp_path / name).write_text(text)
    module = import_file(tmp_path / "model.py")
    tensors: dict[str, torch.Tensor] = {}
    for path in (quantized / "out").glob("*.safetensors"):
        tensors |= load_file(path)
    lost = "backbone.layers.1.mixer.experts.5.up_proj.weight_scale_2"
    del tensors[lost]
    (tmp_path / "cut").mkdir()
    save_file(tensors, tmp_path / "cut/model.safetensors")
    with pytest.raises(module.CheckpointError, match=f"{lost}: missing"):
        module.load_checkpoint(module.Model(), tmp_path / "cut")


def test_build_takes_it_as_it_is(quantized: Path, tmp_path: Path) -> None:
    good = n3c(
        "build", quantized / "spec.toml", "--target", "onnx", "--weights", quantized / "out", "-o", tmp_path / "a"
    )
    assert good.code == 0, good.err
    other = "quantization.rules.1.format=bf16"
    arguments = ("--target", "onnx", "--weights", quantized / "out", "-o", tmp_path / "b", "--json", "--set", other)
    bad = n3c("build", quantized / "spec.toml", *arguments)
    assert (bad.code, set(bad.codes)) == (6, {"E0619"})
    assert not (tmp_path / "b").exists()


def test_inspect_counts_what_is_held(quantized: Path) -> None:
    held = n3c("inspect", quantized / "out", "--json").data["checkpoint"]
    checkpoint = Checkpoint(quantized / "out")
    assert held["layout"] == "modelopt"
    assert held["bytes"] == sum(checkpoint.bytes(name) for name in checkpoint)
    assert sum(entry["bytes"] for entry in held["by_format"].values()) == held["bytes"]
    assert held["by_format"]["fp8"]["weights"] == 3
    assert held["by_format"]["w4a16_nvfp4"]["weights"] > 50
    plain = n3c("inspect", quantized / "source", "--json").data["checkpoint"]
    assert plain["layout"] == "plain"
    assert set(plain["by_format"]) == {"bf16", "f32"}
    assert "held by the checkpoint" in n3c("inspect", quantized / "out").out


def test_inspect_reads_compressed_tensors(quantized: Path, tmp_path: Path) -> None:
    """The names of compressed-tensors' nvfp4-pack-quantized, and its config."""
    tensors: dict[str, torch.Tensor] = {}
    for path in (quantized / "out").glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            if tensor.dtype is torch.uint8:
                tensors[f"{name}_packed"] = tensor
                tensors[name.removesuffix("weight") + "input_global_scale"] = torch.ones(1)
            elif name.endswith("_scale_2"):
                tensors[name.removesuffix("scale_2") + "global_scale"] = (1 / tensor).reshape(1)
            else:
                tensors[name] = tensor
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((quantized / "source/config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    held = n3c("inspect", tmp_path, "--json").data["checkpoint"]
    assert held["layout"] == "compressed-tensors"
    expected = n3c("inspect", quantized / "out", "--json").data["checkpoint"]["by_format"]
    assert held["by_format"]["nvfp4"]["weights"] == expected["w4a16_nvfp4"]["weights"]
    assert n3c("import", tmp_path, "--json").codes == ["E0305"]


def test_a_spec_of_the_repository_reads_back(quantized: Path) -> None:
    """Formats and blocks of every weight survive the two configs."""
    spec, _ = load_spec(quantized / "spec.toml")
    assert spec.quantization is not None
    assert spec.quantization.block == (16, 16)
    assert [rule.format for rule in spec.quantization.rules] == ["bf16", "fp8", "w4a16_nvfp4"]
