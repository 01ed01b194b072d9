"""Quantized checkpoints elsewhere: ModelOpt's own export, generated PyTorch, `n3c build --weights`, `n3c inspect`."""

from __future__ import annotations

import copy
import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from n3c.backends.safetensors import nvfp4
from n3c.backends.safetensors.checkpoint import Checkpoint
from n3c.backends.safetensors.sources import load
from n3c.backends.torch.emit import emit
from n3c.backends.torch.loading import load_package
from n3c.ir.source import Fp8, Nvfp4, tensor_names
from n3c.passes.serving import serve
from n3c.specs.convert import run_import
from n3c.specs.load import load_spec
from support.checkpoints import POLICY, as_bytes, policy_spec, write_checkpoint
from support.command import n3c
from support.models import small_config, transformers_model
from support.specs import SMALL

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

LINEAR_ROLES = (
    *("mamba.in_proj", "mamba.out_proj", "mlp.up", "mlp.down", "lm_head", "moe.router"),
    *(f"attention.{part}_proj" for part in "qkvo"),
    *("moe.latent_up", "moe.latent_down", "moe.experts.up", "moe.experts.down", "moe.shared.up", "moe.shared.down"),
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a BF16 checkpoint of transformers, and ModelOpt's own export of the same weights."""
    folder = tmp_path_factory.mktemp("modelopt")
    config = small_config("ME*-", vocab_size=64, chunk_size=16, n_routed_experts=4, num_experts_per_tok=2)
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
    uncalibrated = {"backbone.layers.0.mixer.out_proj.input_scale"}
    assert ours.keys() - uncalibrated == {name for name in expected if not name.endswith(".input_scale")}
    assert ours.pop(*uncalibrated) == 1
    assert sum(tensor.dtype is torch.uint8 for tensor in ours.values()) == 19
    for name, tensor in ours.items():
        assert tensor.dtype is expected[name].dtype, name
        assert tensor.shape == expected[name].shape, name
        assert as_bytes(tensor) == as_bytes(expected[name]), name


def test_both_configs_say_what_the_tensors_are(exported: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "spec.toml").write_text(run_import(exported[0]).text)
    chosen = ("--set", "quantization.format=nvfp4")  # FP8 by choice: the recipe alone needs activation scales for it
    result = n3c("quantize", tmp_path / "spec.toml", "--weights", exported[0], "-o", tmp_path / "out", *chosen)
    assert result.code == 0
    assert "4 FP8 linears have no measured input_scale, which readers cannot do without: they get 1," in result.err
    config = json.loads((tmp_path / "out/config.json").read_text())
    hf = json.loads((tmp_path / "out/hf_quant_config.json").read_text())["quantization"]
    assert config["hybrid_override_pattern"] == "ME*-"
    assert not {"layers_block_type", "mtp_layers_block_type"} & set(config)  # which the source has
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


def test_weight_only_nvfp4_has_an_entry_for_each_linear(exported: tuple[Path, Path], tmp_path: Path) -> None:
    """As the one algorithm for all, Edge-LLM would quantize activations, with a scale of 1."""
    spec = tmp_path / "spec.toml"
    text = run_import(exported[0]).text
    rules = SAME_LAYERS.replace(
        'roles = ["mamba.out_proj"]\nformat = "fp8"', 'roles = ["attention.*"]\nformat = "bf16"'
    )
    spec.write_text(text[: text.index("[quantization]")] + rules)
    assert n3c("quantize", spec, "--weights", exported[0], "-o", tmp_path / "out").code == 0
    said = json.loads((tmp_path / "out/hf_quant_config.json").read_text())["quantization"]
    layers = said.pop("quantized_layers")
    assert said == {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": None}
    checkpoint = Checkpoint(tmp_path / "out")
    held = {name.removesuffix(".weight") for name in checkpoint if checkpoint.info(name)[0] == "U8"}
    assert layers == {name: {"quant_algo": "W4A16_NVFP4", "group_size": 16} for name in held}
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    weights = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    (group,) = config["config_groups"].values()
    assert (set(group.pop("targets")), group) == (held, {"weights": weights})
    assert config["ignore"] == [
        "backbone.layers.0.mixer.conv1d",
        *(f"backbone.layers.2.mixer.{name}_proj" for name in "koqv"),
        "lm_head",
    ]


def test_what_is_not_quantized_has_no_quantization_config(exported: tuple[Path, Path], tmp_path: Path) -> None:
    """vLLM refuses one without an algorithm. A source's own is not carried over either."""
    bf16 = ("--fmt", "bf16", "--set", "quantization.format=bf16", "--json")
    (tmp_path / "source").mkdir()
    for path in exported[0].iterdir():
        (tmp_path / "source" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "source/hf_quant_config.json").write_text('{"quantization": {"quant_algo": null}}')
    result = n3c("quantize", "--weights", tmp_path / "source", "-o", tmp_path / "out", *bf16)
    assert result.code == 0, result.err
    assert "note[W0624]: nothing is quantized: config.json has no quantization_config" in result.err
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    assert not (tmp_path / "out/hf_quant_config.json").exists()
    again = run_import(tmp_path / "out").spec
    assert again.quantization is not None
    assert (again.quantization.format, again.quantization.rules) == ("bf16", ())


def test_fields_of_the_source_keep_their_meaning(exported: tuple[Path, Path], tmp_path: Path) -> None:
    """`time_step_min` beside `n3c.time_step_min` is transformers' bound; SGLang's name of the groups is added."""
    (tmp_path / "source").mkdir()
    for path in exported[0].iterdir():
        (tmp_path / "source" / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "source/config.json").read_text())
    config |= {"time_step_min": 1e-12, "n3c": {"name": "trained", "time_step_min": 0.002}}
    config.pop("mamba_n_groups", None)
    (tmp_path / "source/config.json").write_text(json.dumps(config))
    result = n3c("quantize", "--weights", tmp_path / "source", "-o", tmp_path / "out")
    assert result.code == 0, result.err
    made = json.loads((tmp_path / "out/config.json").read_text())
    assert (made["time_step_min"], made["n3c"]["time_step_min"]) == (1e-12, 0.002)
    assert made["mamba_n_groups"] == made["n_groups"]
    assert run_import(tmp_path / "out").spec.mamba == run_import(tmp_path / "source").spec.mamba


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized")
    write_checkpoint(folder / "source", policy_spec())
    assert n3c("quantize", "--weights", folder / "source", "-o", folder / "out", "--max-shard-size", "100kb").code == 0
    assert n3c("import", folder / "out", "-o", folder / "spec.toml").code == 0
    return folder


def test_the_generated_model_loads_it_dequantized(quantized: Path, tmp_path: Path) -> None:
    module = load_package(emit(policy_spec(), "0" * 64))
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
    module = load_package(emit(policy_spec(), "0" * 64))
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


@pytest.fixture(scope="module")
def few_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a quantized checkpoint of one block of each kind, `out`, and its spec."""
    folder = tmp_path_factory.mktemp("few")
    text = SMALL.replace("MEM*E-ME", "ME*-").replace('[mtp]\npattern = "*E"\ndepth = 2\n', "")
    text = text.replace("[serving]\n", "[serving]\nbatch_sizes = [1]\ndraft_tokens = 0\n")
    (folder / "source.toml").write_text(text + POLICY.replace('"mtp.*", ', ""), encoding="utf-8")
    spec, _ = load_spec(folder / "source.toml")
    write_checkpoint(folder / "source", spec)
    assert n3c("quantize", "--weights", folder / "source", "-o", folder / "out").code == 0
    assert n3c("import", folder / "out", "-o", folder / "spec.toml").code == 0
    return folder


def test_tensorrt_takes_it_as_it_is(few_layers: Path, tmp_path: Path) -> None:
    spec, weights, out = few_layers / "spec.toml", few_layers / "out", tmp_path / "built"
    result = n3c("build", spec, "--target", "trt", "--weights", weights, "-o", out, "--json")
    assert result.code == 0, result.err
    assert (out / "trt/decode.b1.plan").stat().st_size > 10_000

    ledger = json.loads((weights / "n3c_ledger.json").read_text())["weights"]
    held = {
        line["name"]: line["format"]
        for line in ledger
        if line["role"] in LINEAR_ROLES and line["name"].endswith(".weight")
    }
    assert set(held.values()) == {"w4a16_nvfp4", "fp8", "bf16"}
    bound: dict[str, str] = {}
    for row in json.loads((out / "trt/bindings.json").read_text())["weights"]:
        if "_scale" not in row["name"]:  # of blocks, tensors and activations, and block scales as bytes
            for name in _named(row["source"]):
                bound[name] = row["dtype"]
    dtypes = {"w4a16_nvfp4": ("f4e2m1", "i8"), "fp8": ("f8e4m3",), "bf16": ("bf16",)}
    for name, format_ in held.items():
        assert bound[name] in dtypes[format_], name

    audit = json.loads((out / "trt/audit.json").read_text())
    assert audit["summary"]["mismatches"] == 0
    one_expert = {name.replace("experts.0.", "experts.*."): format_ for name, format_ in held.items()}
    for row in audit["linears"]:
        assert row["requested"] == row["realised"] == one_expert[f"{row['name']}.weight"], row["name"]


def test_engines_are_fed_the_stored_bytes(few_layers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is quantized again: codes and scales of every weight are those of the checkpoint."""
    monkeypatch.setattr(nvfp4, "quantize", None)
    spec, _ = load_spec(few_layers / "spec.toml")
    checkpoint = Checkpoint(few_layers / "out")
    quantized = 0
    for parameter in serve(spec).program.parameters.values():
        if isinstance(parameter.source, (Nvfp4, Fp8)):
            suffix = {"codes": "", "scale": "_scale", "scale_2": "_scale_2"}[parameter.source.part]
            stored = [checkpoint.read(f"{name}{suffix}").tobytes() for name in tensor_names(parameter.source)]
            assert load(parameter, checkpoint).tobytes() == b"".join(stored), parameter.name
            quantized += 1
    assert quantized == 38


def _named(source: str) -> list[str]:
    """Return the tensors that a `source` of bindings.json names."""
    stack = re.search(r"stack\((\S+), (\d+)\)", source)
    if stack is not None:
        return [stack[1].replace("*", str(i)) for i in range(int(stack[2]))]
    return re.findall(r"[a-z][\w.]*\.weight", source)


@pytest.mark.parametrize("target", ["onnx", "trt"])
def test_another_format_than_that_of_the_checkpoint_is_refused(few_layers: Path, tmp_path: Path, target: str) -> None:
    arguments = ("--target", target, "--weights", few_layers / "out", "-o", tmp_path / "b", "--json")
    changed = ("--set", "quantization.format=fp8")
    result = n3c("build", few_layers / "spec.toml", *arguments, *changed)
    assert (result.code, result.codes[0]) == (6, "E0619")
    first = result.data["diagnostics"][0]
    words = r"\d+ tensors are stored as NVFP4, the spec asks for fp8: (`backbone\.layers\S+`,? ){3}and \d+ more"
    assert re.fullmatch(words, first["message"])
    assert first["file"] == str(few_layers / "out/model.safetensors")
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
