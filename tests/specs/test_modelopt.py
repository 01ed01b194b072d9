"""ModelOpt's quantization configs become rules that give each module its format."""

from __future__ import annotations

import json
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from n3c.ir.diagnostics import N3CError
from n3c.specs.convert import run_import
from n3c.specs.huggingface import export_config, import_config
from n3c.specs.json_places import parse_json
from n3c.specs.load import load_spec
from n3c.specs.modules import groups_of
from n3c.specs.roles import select_layers
from n3c.specs.schema import Quantization, Rule, Spec

SPECS = Path(__file__).parents[2] / "specs"


def config_of(name: str) -> dict[str, Any]:
    config = export_config(load_spec(SPECS / f"{name}.toml")[0])
    del config["n3c"]
    return config


def read(config: dict[str, Any], quantization: dict[str, Any] | None = None) -> tuple[Spec, list[str]]:
    parsed, places = parse_json(json.dumps(config), "config.json")
    spec, warnings = import_config(parsed, places, "x", quantization)
    return spec, [item.code for item in warnings]


def formats(spec: Spec) -> dict[str, str]:
    """Apply the rules of [quantization] to every module, in the plainest way."""
    assert spec.quantization is not None
    found: dict[str, str] = {}
    for group in groups_of(spec):
        for module in group.modules:
            found[module] = decide(spec.quantization, spec, group.role, group.layer, module)
    return found


def decide(quantization: Quantization, spec: Spec, role: str, layer: int | None, module: str) -> str:
    chosen: str = quantization.format
    for rule in quantization.rules:
        by_role = any(fnmatchcase(role, glob) for glob in rule.roles)
        in_layer = rule.layers == "all" or layer in select_layers(rule.layers, spec.model.pattern)
        if module in rule.modules or (by_role and in_layer):
            chosen = rule.format
    return chosen


def test_module_names() -> None:
    spec, _ = load_spec(SPECS / "tiny.toml")
    groups = groups_of(spec)
    names = [name for group in groups for name in group.modules]
    assert len(names) == len(set(names))
    for name in (
        "backbone.embeddings",
        "backbone.layers.0.mixer.in_proj",
        "backbone.layers.1.mixer.gate",
        "backbone.layers.1.mixer.fc1_latent_proj",
        "backbone.layers.1.mixer.experts.15.down_proj",
        "backbone.layers.1.mixer.shared_experts.up_proj",
        "backbone.layers.3.mixer.q_proj",
        "mtp.layers.0.eh_proj",
        "mtp.layers.0.mixer.o_proj",
        "mtp.layers.1.mixer.experts.0.up_proj",
        "lm_head",
    ):
        assert name in names


def test_released_nano() -> None:
    """NVFP4 but for the head, attention, the Mamba layers in front of it, and the convolutions."""
    mixer = "backbone.layers.{}.mixer.{}"
    excluded = ["lm_head"]
    excluded += [mixer.format(i, f"{name}_proj") for i in (5, 12, 19, 26, 33, 42) for name in "qkvo"]
    excluded += [mixer.format(i, f"{name}_proj") for i in (4, 11, 18, 25, 32, 41) for name in ("in", "out")]
    excluded += [mixer.format(i, "conv1d") for i in range(52)]
    spec, codes = read(
        config_of("nano"),
        {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16, "exclude_modules": excluded},
    )
    assert codes == ["W0303"]  # conv1d of layers that are no Mamba layers
    assert spec.quantization == Quantization(
        "nvfp4",
        (1, 16),
        (
            Rule("bf16", ("embedding", "mamba.conv1d", "moe.router", "attention.*", "lm_head")),
            Rule("bf16", ("mamba.in_proj", "mamba.out_proj"), "before attention"),
        ),
    )
    assert spec.serving.kv_cache_dtype == "fp8"


def test_recipe_of_super() -> None:
    """The mixed recipe collapses to roles, whether experts are named each or together."""
    spec, _ = load_spec(SPECS / "tiny.toml")
    pattern = spec.model.pattern
    layers: dict[str, dict[str, str]] = {}
    for layer, kind in enumerate(pattern.symbols):
        if kind == "M":
            for name in ("in_proj", "out_proj"):
                layers[f"backbone.layers.{layer}.mixer.{name}"] = {"quant_algo": "FP8"}
        if kind == "E":
            layers[f"backbone.layers.{layer}.mixer.experts"] = {"quant_algo": "NVFP4"}
            for name in ("up_proj", "down_proj"):
                layers[f"backbone.layers.{layer}.mixer.shared_experts.{name}"] = {"quant_algo": "FP8"}
    imported, codes = read(config_of("tiny"), {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers})
    assert codes == []
    assert spec.quantization is not None
    assert imported.quantization == Quantization(
        "nvfp4",
        (1, 16),
        (
            Rule("fp8", ("mamba.in_proj", "mamba.out_proj", "moe.shared.*")),
            Rule(
                "bf16", ("embedding", "mamba.conv1d", "moe.router", "moe.latent_*", "attention.*", "lm_head", "mtp.*")
            ),
        ),
    )
    assert formats(imported) == formats(spec)


def test_mangled_names() -> None:
    """The exporter of modelopt 0.47 with transformers 5 ends every name with a null and a sentinel."""
    names = ["lm_head.\0backbone.pt_name_sentinel", "model.layers.3.mixer.q_proj.\0backbone.pt_name_sentinel"]
    spec, codes = read(config_of("tiny"), {"quant_algo": "FP8", "exclude_modules": names})
    assert codes == []
    found = formats(spec)
    assert found["lm_head"] == found["backbone.layers.3.mixer.q_proj"] == "bf16"
    assert found["backbone.layers.3.mixer.k_proj"] == "fp8"


def test_config_json_forms() -> None:
    config = config_of("tiny")
    config["quantization_config"] = {
        "quant_method": "modelopt",
        "quant_algo": "W4A16_NVFP4",
        "ignore": ["lm_head", "backbone.layers.*.mixer.shared_experts.*"],
        "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
    }
    spec, codes = read(config)
    assert codes == []
    found = formats(spec)
    assert found["backbone.layers.1.mixer.experts.3.up_proj"] == "w4a16_nvfp4"
    assert found["backbone.layers.1.mixer.shared_experts.up_proj"] == "bf16"
    assert found["mtp.layers.0.mixer.q_proj"] == "bf16"
    assert spec.serving.kv_cache_dtype == "fp8"


def test_checkpoint_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of("tiny")), encoding="utf-8")
    uniform = {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    quantization = {"producer": {"name": "modelopt"}, "quantization": uniform}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(quantization), encoding="utf-8")
    assert formats(run_import(tmp_path).spec)["backbone.layers.0.mixer.in_proj"] == "fp8"
    (tmp_path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "INT4"}}', encoding="utf-8")
    with pytest.raises(N3CError) as caught:
        run_import(tmp_path)
    assert str(caught.value.diagnostics[0].span).endswith("hf_quant_config.json:1:33")


def test_the_specs_own_words_outrank_the_quantizers() -> None:
    spec, _ = load_spec(SPECS / "tiny.toml")
    config = export_config(spec)
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": []}
    assert read(config)[0] == spec


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_any_mixture_is_kept(data: st.DataObject) -> None:
    """Whatever format each module has: the rules give it back, and stay short where they can."""
    config = config_of("tiny-moe")
    spec, _ = read(config)
    groups = groups_of(replace(spec, mtp=None))
    chosen: dict[str, str] = {}
    for group in groups:
        if group.role in ("embedding", "mamba.conv1d", "moe.router"):
            continue
        usual = data.draw(st.sampled_from(["NVFP4", "FP8", "BF16"]))
        for module in group.modules:
            other = data.draw(st.integers(0, 9)) == 0
            chosen[module] = data.draw(st.sampled_from(["NVFP4", "FP8", "BF16"])) if other else usual
    layers = {module: {"quant_algo": name} for module, name in chosen.items() if name != "BF16"}
    imported, codes = read(config, {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers})
    assert codes == []
    for module, name in formats(imported).items():
        assert name == chosen.get(module, "BF16").lower()


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_algo": "INT4_AWQ"}, "INT4_AWQ"),
        ({"quant_algo": 4}, "algorithm `4`"),
        ({"quant_algo": "MIXED_PRECISION"}, "must be an object"),
        ({"quant_algo": "MIXED_PRECISION", "quantized_layers": {"lm_head": None}}, "algorithm `None`"),
        ({"quant_algo": "FP8", "exclude_modules": "lm_head"}, "must be a list"),
        ({"quant_algo": "FP8", "exclude_modules": [1]}, "must be a list"),
        ({"quant_algo": "FP8", "kv_cache_quant_algo": "NVFP4"}, "only an FP8 cache"),
    ],
)
def test_errors(quantization: dict[str, Any], message: str) -> None:
    with pytest.raises(N3CError, match=message) as caught:
        read(config_of("tiny"), quantization)
    assert [item.code for item in caught.value.diagnostics] == ["E0305"]


def test_unquantized() -> None:
    spec, _ = read(config_of("tiny"), {"quant_algo": None, "kv_cache_quant_algo": "FP8"})
    assert spec.quantization == Quantization("bf16")
    assert spec.serving.kv_cache_dtype == "fp8"


def test_full_size_is_quick() -> None:
    """Every linear of Super named one by one, as the release does: 41,000 names."""
    spec, _ = load_spec(SPECS / "super.toml")
    assert spec.moe is not None
    groups = groups_of(replace(spec, mtp=None))
    layers = {
        module: {"quant_algo": "NVFP4" if group.experts else "FP8"}
        for group in groups
        if group.experts or group.role.startswith("mamba.in")
        for module in group.modules
    }
    assert len(layers) == 41_000
    imported, codes = read(config_of("super"), {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers})
    assert codes == []
    assert imported.quantization is not None
    assert len(imported.quantization.rules) == 2
