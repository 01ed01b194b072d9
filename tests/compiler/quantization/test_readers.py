"""Quantized checkpoints as vLLM, SGLang and TensorRT Edge-LLM read them, by their own rules (`support.readers`)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig

from n3c.backends.safetensors.checkpoint import Checkpoint
from n3c.compiler.quantization.calibration.activation_scales import entries_of, save_scales
from n3c.compiler.quantization.calibration.calibrate import Amax
from n3c.compiler.quantization.units import find_linears
from n3c.specs.convert import run_import
from support.checkpoints import write_checkpoint
from support.command import n3c
from support.readers import EdgeLlm, Layer, Sglang, Vllm, layers_of
from support.specs import small_spec

MIXED = """
[quantization]
format = "nvfp4"
block = [1, 16]
[[quantization.rules]]
roles = ["mamba.*_proj", "moe.shared.*", "attention.*"]
format = "fp8"
[[quantization.rules]]
roles = ["moe.latent_*", "mlp.*"]
format = "w4a16_nvfp4"
[[quantization.rules]]
roles = ["moe.router", "lm_head", "embedding", "mamba.conv1d", "mtp.*"]
format = "bf16"
[[quantization.rules]]
roles = ["moe.experts.*"]
layers = "last 1"
format = "bf16"
[[quantization.rules]]
modules = ["backbone.layers.0.mixer.out_proj"]
format = "bf16"
"""
UNIFORM = MIXED.replace('"fp8"', '"bf16"').replace('"w4a16_nvfp4"', '"nvfp4"')
WITHOUT_WEIGHT_ONLY = MIXED.replace('"w4a16_nvfp4"', '"nvfp4"')


class Made:
    """A quantized checkpoint, and what its tensors are."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self.hf: dict[str, Any] = json.loads((folder / "hf_quant_config.json").read_text())
        self.checkpoint = Checkpoint(folder)
        # what a loader has a linear for: matrices, but for the router and the embedding
        self.modules = [
            name.removesuffix(".weight")
            for name in self.checkpoint
            if re.search(r"(_proj|lm_head|conv1d)\.weight$", name)
        ]

    def held(self, module: str) -> str | None:
        """Return the algorithm of a linear, from its tensors alone."""
        kind = self.checkpoint.info(f"{module}.weight")[0]
        if kind not in ("U8", "F8_E4M3"):
            return None
        calibrated = f"{module}.input_scale" in self.checkpoint
        return "FP8" if kind == "F8_E4M3" else "NVFP4" if calibrated else "W4A16_NVFP4"

    def held_of(self, layer: Layer) -> str | None:
        """Return the algorithm of what a loader merges into one."""
        (found,) = {self.held(module) for module in layer.modules}
        return found


def make(folder: Path, table: str, *, calibrated: bool) -> Made:
    spec = small_spec(table)
    write_checkpoint(folder / "source", spec, with_spec=bool(table))
    arguments: list[object] = ["quantize", "--weights", folder / "source", "-o", folder / "out"]
    if calibrated:
        inputs = {linear.module: 1.0 + i / 8 for i, linear in enumerate(find_linears(spec))}
        for last in ("k_proj", "v_proj"):  # they read what q_proj reads
            inputs |= {name: inputs[name[:-6] + "q_proj"] for name in inputs if name.endswith(last)}
        save_scales(folder / "scales.json", entries_of(Amax(inputs, {})))
        arguments += ["--activation-scales", folder / "scales.json"]
    result = n3c(*arguments)
    assert result.code == 0, result.err
    return Made(folder / "out")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    folder = tmp_path_factory.mktemp("readers")
    return {
        "uniform": make(folder / "uniform", UNIFORM, calibrated=True),
        "mixed": make(folder / "mixed", MIXED, calibrated=True),
        "two formats": make(folder / "two", WITHOUT_WEIGHT_ONLY, calibrated=True),
        "by default": make(folder / "default", "", calibrated=False),
        "FP8 uncalibrated": make(folder / "fp8", MIXED, calibrated=False),
    }


ALL = ("uniform", "mixed", "two formats", "by default", "FP8 uncalibrated")
ALGORITHM = {
    "uniform": "NVFP4",
    "mixed": "MIXED_PRECISION",
    "two formats": "MIXED_PRECISION",
    "by default": "MIXED_PRECISION",
    "FP8 uncalibrated": "MIXED_PRECISION",
}


@pytest.mark.parametrize("name", ALL)
def test_vllm_loads_every_layer_as_it_is_stored(made: dict[str, Made], name: str) -> None:
    checkpoint = made[name]
    assert checkpoint.hf["quantization"]["quant_algo"] == ALGORITHM[name]
    assert checkpoint.hf["producer"]["name"] == "modelopt"  # by which vLLM knows the file
    readers = [Vllm(checkpoint.config["quantization_config"]), Vllm(checkpoint.hf)]
    layers = layers_of(checkpoint.modules)
    assert sum(layer.experts for layer in layers) == 4
    for layer in layers:
        for reader in readers:
            assert reader.format(layer) == checkpoint.held_of(layer), layer.name


@pytest.mark.parametrize("name", ALL)
def test_sglang_loads_every_layer_as_it_is_stored(made: dict[str, Made], name: str) -> None:
    checkpoint = made[name]
    for reader in (Sglang(checkpoint.config["quantization_config"]), Sglang(checkpoint.hf)):
        for layer in layers_of(checkpoint.modules):
            assert reader.format(layer) == checkpoint.held_of(layer), layer.name


@pytest.mark.parametrize("name", ALL)
def test_edge_llm_loads_every_linear_as_it_is_stored(made: dict[str, Made], name: str) -> None:
    checkpoint = made[name]
    reader = EdgeLlm(checkpoint.hf, checkpoint.checkpoint)
    kinds = {"NVFP4": "nvfp4", "W4A16_NVFP4": "w4a16_nvfp4", "FP8": "fp8", None: None}
    for module in checkpoint.modules:
        assert reader.format(module) == kinds[checkpoint.held(module)], module


@pytest.mark.parametrize("name", ALL)
def test_no_reader_has_to_make_up_a_scale(made: dict[str, Made], name: str) -> None:
    """vLLM takes the lowest float32 for an input_scale that is missing, Edge-LLM 1."""
    checkpoint = made[name].checkpoint
    algorithms = made[name].hf["quantization"].get("quantized_layers", {})
    for module in made[name].modules:
        declared = algorithms.get(module, {}).get("quant_algo")
        if made[name].held(module) in ("FP8", "NVFP4"):
            assert f"{module}.input_scale" in checkpoint, module
        elif made[name].held(module) is not None:
            assert declared == "W4A16_NVFP4", module


@pytest.mark.parametrize("name", ALL)
def test_transformers_and_n3c_read_the_config(made: dict[str, Made], name: str) -> None:
    written = made[name].config
    assert (written["hybrid_override_pattern"], written["mtp_hybrid_override_pattern"]) == ("MEM*E-ME", "*E")
    assert not {"layers_block_type", "mtp_layers_block_type"} & set(written)
    config = AutoConfig.from_pretrained(made[name].folder)
    assert config.num_hidden_layers == 8
    assert config.layers_block_type[:4] == ["linear_attention", "moe", "linear_attention", "full_attention"]
    spec = run_import(made[name].folder).spec
    assert spec.model.pattern.symbols == "MEM*E-ME"
    again = n3c("inspect", made[name].folder, "--json")
    assert again.code == 0, again.err


def test_the_formats_are_read_from_either_file_alone(made: dict[str, Made], tmp_path: Path) -> None:
    """Without n3c's own words: an excluded `….mixer.experts` means all experts of the layer."""
    for name in ("uniform", "mixed"):
        held = made[name]
        for file in ("config.json", "hf_quant_config.json"):
            folder = tmp_path / f"{name}-{file}"
            folder.mkdir()
            config = {key: value for key, value in held.config.items() if key != "n3c"}
            if file == "hf_quant_config.json":
                del config["quantization_config"]
                (folder / file).write_text(json.dumps(held.hf))
            (folder / "config.json").write_text(json.dumps(config))
            spec = run_import(folder).spec
            table, expected = spec.quantization, run_import(held.folder).spec.quantization
            assert table is not None
            assert expected is not None
            assert table.format == expected.format == "nvfp4"
            (folder / "spec.toml").write_text(run_import(folder).text)
            rebuilt = n3c(
                "quantize", folder / "spec.toml", "--weights", held.folder.parent / "source",
                "--activation-scales", held.folder.parent / "scales.json", "-o", folder / "again",
            )  # fmt: skip
            assert rebuilt.code == 0, rebuilt.err
            again = Made(folder / "again")
            assert {m: again.held(m) for m in again.modules} == {m: held.held(m) for m in held.modules}


@pytest.mark.parametrize("name", ["uniform", "mixed", "two formats"])
def test_what_is_merged_shares_its_scales(made: dict[str, Made], name: str) -> None:
    """Loaders keep one scale of a merged linear, the largest, and do not rescale the codes."""
    checkpoint = made[name].checkpoint
    shared = 0
    for layer in layers_of(made[name].modules):
        if layer.experts or len(layer.modules) == 1 or made[name].held_of(layer) is None:
            continue
        for suffix in ("weight_scale_2", "weight_scale", "input_scale"):
            scales = [checkpoint.read(n) for m in layer.modules if (n := f"{m}.{suffix}") in checkpoint]
            if scales and scales[0].size == 1:
                assert len({float(np.asarray(scale)) for scale in scales}) == 1, layer.name
                shared += 1
    assert shared == (0 if name == "uniform" else 2)


def test_what_readers_cannot_merge_is_told(tmp_path: Path) -> None:
    rules = UNIFORM + '[[quantization.rules]]\nroles = ["moe.experts.down"]\nlayers = "1"\nformat = "bf16"\n'
    write_checkpoint(tmp_path / "source", small_spec(rules))
    result = n3c("quantize", "--weights", tmp_path / "source", "-o", tmp_path / "out", "--json")
    assert result.code == 0
    (warning,) = (found for found in result.data["diagnostics"] if found["code"] == "W0623")
    assert "`backbone.layers.1.mixer.experts`" in warning["message"]
