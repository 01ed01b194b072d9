"""What quantized checkpoints say, by what their readers need; tests/readers runs those (docs/readers.md)."""

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

    @property
    def scales(self) -> tuple[object, ...]:
        """The option that it was calibrated by, if it was."""
        path = self.folder.parent / "scales.json"
        return ("--activation-scales", path) if path.exists() else ()

    def held(self, module: str) -> str | None:
        """Return the algorithm of a linear, from its tensors alone."""
        kind = self.checkpoint.info(f"{module}.weight")[0]
        if kind not in ("U8", "F8_E4M3"):
            return None
        calibrated = f"{module}.input_scale" in self.checkpoint
        return "FP8" if kind == "F8_E4M3" else "NVFP4" if calibrated else "W4A16_NVFP4"


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
    "uniform": ("NVFP4", "NVFP4"),
    "mixed": ("MIXED_PRECISION", "MIXED_PRECISION"),
    "two formats": ("MIXED_PRECISION", "MIXED_PRECISION"),
    "by default": ("MIXED_PRECISION", "W4A16_NVFP4"),
    "FP8 uncalibrated": ("MIXED_PRECISION", "MIXED_PRECISION"),
}
"""The `quant_algo` of hf_quant_config.json, which Edge-LLM reads, and of config.json, which the others do."""


def experts_of(module: str) -> str:
    """Return the `….experts` that a linear belongs to, which vLLM and SGLang load as one; empty for another linear."""
    found = re.fullmatch(r"(.+\.experts)\.\d+\.\w+", module)
    return found[1] if found else ""


@pytest.mark.parametrize("name", ALL)
def test_several_formats_and_weight_only_have_a_key_for_each_linear(made: dict[str, Made], name: str) -> None:
    said, config = made[name].hf["quantization"], made[name].config["quantization_config"]
    assert (said["quant_algo"], config["quant_algo"]) == ALGORITHM[name]
    assert made[name].hf["producer"]["name"] == "modelopt"  # by which vLLM knows the file
    if said["quant_algo"] == "MIXED_PRECISION":
        keys = {module: entry["quant_algo"] for module, entry in said["quantized_layers"].items()}
        held = {module: made[name].held(module) for module in made[name].modules}
        assert keys == {module: algorithm for module, algorithm in held.items() if algorithm is not None}
        assert config["quantized_layers"] == said["quantized_layers"]
    else:
        assert {"group_size", "kv_cache_quant_algo", "exclude_modules"} <= set(said)  # vLLM wants all three


@pytest.mark.parametrize("name", ALL)
def test_what_is_left_out_is_no_part_of_what_is_quantized(made: dict[str, Made], name: str) -> None:
    """VLLM also takes a name as a part of another; SGLang leaves experts out by `….experts` only."""
    checkpoint = made[name]
    excluded = set(checkpoint.config["quantization_config"]["ignore"])
    assert excluded == set(checkpoint.hf["quantization"].get("exclude_modules", excluded))
    quantized = [module for module in checkpoint.modules if checkpoint.held(module) is not None]
    assert not [(part, module) for part in excluded for module in quantized if part in module]
    kept = {module for module in checkpoint.modules if checkpoint.held(module) is None}
    experts = {experts_of(module) for module in kept} - {experts_of(module) for module in quantized}
    assert excluded == kept | (experts - {""})


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
    for name in ("uniform", "mixed", "by default"):
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
            assert table.format == expected.format
            (folder / "spec.toml").write_text(run_import(folder).text)
            rebuilt = n3c(
                "quantize", folder / "spec.toml", "--weights", held.folder.parent / "source",
                *held.scales, "-o", folder / "again",
            )  # fmt: skip
            assert rebuilt.code == 0, rebuilt.err
            again = Made(folder / "again")
            assert {m: again.held(m) for m in again.modules} == {m: held.held(m) for m in held.modules}


@pytest.mark.parametrize("name", ["uniform", "mixed", "two formats"])
def test_what_is_merged_shares_its_scales(made: dict[str, Made], name: str) -> None:
    """Loaders keep one scale of a merged linear, the largest, and do not rescale the codes."""
    checkpoint = made[name].checkpoint
    shared = 0
    queries = [module.removesuffix("q_proj") for module in made[name].modules if module.endswith("q_proj")]
    for parent in (parent for parent in queries if made[name].held(f"{parent}q_proj") is not None):
        for suffix in ("weight_scale_2", "weight_scale", "input_scale"):
            names = [f"{parent}{half}_proj.{suffix}" for half in "qkv"]
            scales = [checkpoint.read(tensor) for tensor in names if tensor in checkpoint]
            if scales and scales[0].size == 1:
                assert len({float(np.asarray(scale)) for scale in scales}) == 1, parent
                shared += 1
    assert shared == (0 if name == "uniform" else 2)


def test_what_readers_cannot_merge_is_told(tmp_path: Path) -> None:
    rules = UNIFORM + '[[quantization.rules]]\nroles = ["moe.experts.down"]\nlayers = "1"\nformat = "bf16"\n'
    write_checkpoint(tmp_path / "source", small_spec(rules))
    result = n3c("quantize", "--weights", tmp_path / "source", "-o", tmp_path / "out", "--json")
    assert result.code == 0
    (warning,) = (found for found in result.data["diagnostics"] if found["code"] == "W0623")
    assert "`backbone.layers.1.mixer.experts`" in warning["message"]


NVFP4 = '[quantization]\nformat = "nvfp4"\nblock = [1, 16]\n'
KEPT = '[[quantization.rules]]\nroles = ["embedding", "moe.router", "mamba.*", "mtp.*"]\nformat = "bf16"\n'


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        ("", ["SGLang rounds what W4A16_NVFP4 experts read", "llama.cpp's converter refuses NVFP4 of 32 inputs"]),
        ('[[quantization.rules]]\nroles = ["attention.*"]\nformat = "fp8"\n', ["llama.cpp may round"]),
        ('[[quantization.rules]]\nroles = ["moe.experts.*"]\nformat = "fp8"\n', ["Edge-LLM refuses experts in FP8"]),
        (
            '[[quantization.rules]]\nroles = ["mamba.in_proj"]\nformat = "nvfp4"\n',
            ["SGLang leaves four"],
        ),
        ('[[quantization.rules]]\nroles = ["mtp.eh_proj"]\nformat = "fp8"\n', ["Edge-LLM takes the codes"]),
    ],
)
def test_what_a_reader_runs_otherwise_is_told(tmp_path: Path, rules: str, told: list[str]) -> None:
    spec = small_spec(NVFP4 + KEPT + rules, odd=("intermediate_size = 48", "intermediate_size = 64"))
    write_checkpoint(tmp_path / "source", spec)
    result = n3c("quantize", "--weights", tmp_path / "source", "-o", tmp_path / "out", "--json")
    assert result.code == 0, result.err
    notes = [found["message"] for found in result.data["diagnostics"] if found["code"] == "W0628"]
    for part in told:
        assert [part in note for note in notes].count(True) == 1, notes


def test_an_fp8_cache_is_announced_where_its_scales_are_stored(tmp_path: Path) -> None:
    """VLLM takes 1 for scales that are missing, Edge-LLM then keeps the cache as it is."""
    spec = small_spec(UNIFORM, odd=('kv_cache_dtype = "fp32"', 'kv_cache_dtype = "fp8"'))
    write_checkpoint(tmp_path / "source", spec)
    arguments = ("quantize", "--weights", tmp_path / "source", "--json")
    without = n3c(*arguments, "-o", tmp_path / "without")
    assert without.code == 0, without.err
    assert [found for found in without.data["diagnostics"] if "FP8 cache" in found["message"]]
    linears = [linear.module for linear in find_linears(spec)]
    cached = {name: 2.0 for name in linears if name.endswith(("k_proj", "v_proj"))}
    save_scales(tmp_path / "scales.json", entries_of(Amax(dict.fromkeys(linears, 1.0), cached)))
    with_ = n3c(*arguments, "-o", tmp_path / "with", "--activation-scales", tmp_path / "scales.json")
    assert with_.code == 0, with_.err
    for folder, said in (("without", None), ("with", "FP8")):
        read = Made(tmp_path / folder)
        assert read.hf["quantization"]["kv_cache_quant_algo"] == said
        assert ("kv_cache_scheme" in read.config["quantization_config"]) == (said is not None)
        assert any(name.endswith(".k_scale") for name in read.checkpoint) == (said is not None)
