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

from n3c.compiler.quantization.checkpoint_formats import spec_like
from n3c.compiler.quantization.request import QuantizeRequest
from n3c.compiler.quantization.requested_formats import requested_formats
from n3c.ir.diagnostics import N3CError, Severity
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


@settings(max_examples=12)
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


FLOAT_4 = {"num_bits": 4, "type": "float", "group_size": 16, "dynamic": False}
FLOAT_8 = {"num_bits": 8, "type": "float", "dynamic": False}
IN_PROJ, EXPERT, HEAD = (
    "backbone.layers.0.mixer.in_proj",
    "backbone.layers.1.mixer.experts.3.up_proj",
    "lm_head",
)


def grouped(weights: dict[str, Any], inputs: dict[str, Any] | None, *targets: str, **more: Any) -> dict[str, Any]:
    group = {"weights": weights, "targets": list(targets or ("Linear",))}
    return {"config_groups": {"group_0": group if inputs is None else group | {"input_activations": inputs}}} | more


def named(**formats: str) -> dict[str, Any]:
    return {name.replace("__", "."): {"quant_algo": algorithm} for name, algorithm in formats.items()}


READ: dict[str, tuple[dict[str, Any], tuple[str, str, str]]] = {
    "small letters": ({"quant_algo": "nvfp4", "exclude_modules": ["lm_head"]}, ("nvfp4", "nvfp4", "bf16")),
    "one level deeper": (
        {"quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}, "producer": {"name": "modelopt"}},
        ("fp8", "fp8", "bf16"),
    ),
    "bits alone": (grouped(FLOAT_4, FLOAT_4, ignore=["lm_head"]), ("nvfp4", "nvfp4", "bf16")),
    "bits alone, null beside": (grouped(FLOAT_8, FLOAT_8, quant_algo=None), ("fp8", "fp8", "fp8")),
    "absent activations": (grouped(FLOAT_4, None, ignore=["lm_head"]), ("w4a16_nvfp4", "w4a16_nvfp4", "bf16")),
    "absent activations under an algorithm": (
        grouped(FLOAT_4, None, quant_algo="NVFP4"),
        ("w4a16_nvfp4", "w4a16_nvfp4", "w4a16_nvfp4"),
    ),
    "absent activations of one layer": (
        grouped(FLOAT_4, None, IN_PROJ)
        | {"quant_algo": "MIXED_PRECISION", "quantized_layers": {n: {"quant_algo": "NVFP4"} for n in (IN_PROJ, HEAD)}},
        ("w4a16_nvfp4", "bf16", "nvfp4"),
    ),
    "groups of modules": (
        {
            "config_groups": {
                "a": {"weights": FLOAT_8, "input_activations": FLOAT_8, "targets": [IN_PROJ]},
                "b": {"weights": FLOAT_4, "input_activations": FLOAT_4, "targets": ["*.experts.*"]},
            }
        },
        ("fp8", "nvfp4", "bf16"),
    ),
    "wildcards in what is left out": (
        {"quant_algo": "FP8", "exclude_modules": ["*mixer.in_proj*", "lm_hea?", "model.layers.[17].*"]},
        ("bf16", "bf16", "bf16"),
    ),
    "wildcards in what is quantized": (
        {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"model.layers.*.mixer.experts*": {"quant_algo": "FP8"}}},
        ("bf16", "fp8", "bf16"),
    ),
    "prefixes": (
        {
            "quant_algo": "MIXED_PRECISION",
            "quantized_layers": {
                f"language_model.{IN_PROJ}": {"quant_algo": "FP8"},
                "module._orig_mod." + EXPERT: {"quant_algo": "NVFP4", "group_size": 16},
                "language_model.lm_head": {"quant_algo": "W4A16_NVFP4"},
            },
        },
        ("fp8", "nvfp4", "w4a16_nvfp4"),
    ),
    "a part of names that are never quantized": (
        {"quant_algo": "FP8", "exclude_modules": ["conv1d", "mixer.gate"]},
        ("fp8", "fp8", "fp8"),
    ),
}


@pytest.mark.parametrize("name", READ)
def test_every_form_is_read_alike(name: str, tmp_path: Path) -> None:
    """`import`, `quantize` without a spec, and `--like` agree, whichever file says it."""
    said, expected = READ[name]
    spec, _ = load_spec(SPECS / "tiny.toml")
    for file in ("config.json", "hf_quant_config.json"):
        folder = tmp_path / file
        folder.mkdir()
        config = config_of("tiny")
        if file == "config.json":
            config["quantization_config"] = {"quant_method": "ModelOpt"} | said
        else:
            hf = said if "quantization" in said else {"quantization": said}
            (folder / file).write_text(json.dumps(hf), encoding="utf-8")
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        imported = run_import(folder).spec
        like, _ = spec_like(spec, folder, None)
        requested = requested_formats(QuantizeRequest(folder, folder / "out")).spec
        assert imported.quantization == like.quantization == requested.quantization
        found = formats(imported)
        assert (found[IN_PROJ], found[EXPERT], found[HEAD]) == expected


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "unknown": ({"quant_algo": "INT3"}, "algorithm `INT3`", "quantize the unquantized checkpoint"),
    "no text": ({"quant_algo": 4}, "algorithm `4`", ""),
    "AWQ": ({"quant_algo": "NVFP4_AWQ"}, "algorithm `NVFP4_AWQ`", "pre_quant_scale"),
    "AWQ by its scales": ({"quant_algo": "NVFP4", "pre_quant_scale": True}, "`pre_quant_scale`", "without"),
    "AWQ of a layer": (
        {"quant_algo": "MIXED_PRECISION", "quantized_layers": named(lm_head="W4A16_AWQ")},
        "`W4A16_AWQ`",
        "pre_quant_scale",
    ),
    "no algorithm": ({"exclude_modules": []}, "neither `quant_algo` nor `config_groups`", "null where nothing"),
    "no layers": ({"quant_algo": "MIXED_PRECISION"}, "must be an object", ""),
    "no entry": ({"quant_algo": "MIXED_PRECISION", "quantized_layers": {"lm_head": None}}, "algorithm `None`", ""),
    "exclusions are no list": ({"quant_algo": "FP8", "exclude_modules": "lm_head"}, "must be a list", ""),
    "exclusions are no names": ({"quant_algo": "FP8", "exclude_modules": [1]}, "must be a list", ""),
    "blocks of 32": ({"quant_algo": "NVFP4", "group_size": 32}, "`group_size` is 32", "unquantized checkpoint"),
    "blocks of 32 in a layer": (
        {
            "quant_algo": "MIXED_PRECISION",
            "quantized_layers": {"lm_head": {"quant_algo": "W4A16_NVFP4", "group_size": 32}},
        },
        "`group_size` is 32",
        "",
    ),
    "blocks of 32 in a group": (grouped(FLOAT_4 | {"group_size": 32}, FLOAT_4), "`group_size` is 32", ""),
    "integers": (grouped({"num_bits": 4, "type": "int", "group_size": 128}, None), "4-bit int weights", ""),
    "FP8 weights alone": (grouped(FLOAT_8, None), "8-bit float weights with no activations", ""),
    "4 and 8 bits": (grouped(FLOAT_4, FLOAT_8), "4-bit float weights with 8-bit float activations", ""),
    "FP8 by rows": (grouped(FLOAT_8 | {"strategy": "channel"}, FLOAT_8), "activations by rows", ""),
    "FP8, dynamic": (grouped(FLOAT_8, FLOAT_8 | {"dynamic": True}), "with dynamic scales", ""),
    "algorithm and bits differ": (grouped(FLOAT_8, FLOAT_8, quant_algo="NVFP4"), "has the bits of fp8", "correct one"),
    "layer and bits differ": (
        grouped(FLOAT_8, FLOAT_8, "lm_head")
        | {"quant_algo": "MIXED_PRECISION", "quantized_layers": named(lm_head="NVFP4")},
        "`lm_head` is nvfp4, but `group_0` has the bits of fp8",
        "",
    ),
    "given twice": (
        {"quant_algo": "NVFP4", "quantization": {"quant_algo": "FP8"}},
        "`quant_algo` is given twice",
        "correct one",
    ),
    "an embedding": (
        {"quant_algo": "MIXED_PRECISION", "quantized_layers": named(backbone__embeddings="W4A16_NVFP4")},
        "`backbone.embeddings` is quantized",
        "in BF16",
    ),
    "embeddings by wildcard": (
        {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"*embed*": {"quant_algo": "NVFP4"}}},
        "`backbone.embeddings` is quantized",
        "in BF16",
    ),
    "embeddings by class": (grouped(FLOAT_4, None, "Linear", "Embedding"), "embeddings are quantized", "in BF16"),
    "a regular expression": (
        {"quant_algo": "FP8", "ignore": ["re:.*lm_head"]},
        "`re:.*lm_head` is a regular expression",
        "wildcards",
    ),
    "an unmarked regular expression": (
        {"quant_algo": "FP8", "ignore": [r"backbone\.layers\.\d+\.mixer\.in_proj"]},
        r"`backbone\.layers\.\d+\.mixer\.in_proj` is a regular expression",
        "wildcards",
    ),
    "one that looks like a wildcard": ({"quant_algo": "FP8", "ignore": [".*in_proj"]}, "is a regular expression", ""),
    "a regular expression, quantized": (grouped(FLOAT_4, None, "re:.*mlp.*"), "is a regular expression", ""),
    "a long wildcard": ({"quant_algo": "FP8", "ignore": ["*" + "a" * 200]}, "more than 200 characters", ""),
    "many wildcards": ({"quant_algo": "FP8", "ignore": [f"*{n}" for n in range(300)]}, "more than 256", "name the"),
    "a part of names": (
        {"quant_algo": "FP8", "exclude_modules": ["in_proj"]},
        f"`in_proj` is a part of names, as of `{IN_PROJ}`",
        "write `*in_proj*`",
    ),
    "capital letters": ({"quant_algo": "FP8", "exclude_modules": ["LM_head"]}, "`LM_head` matches no", "`lm_head`?"),
    "both": (
        {"quant_algo": "MIXED_PRECISION", "quantized_layers": named(lm_head="FP8"), "ignore": ["lm_*"]},
        "`lm_head` is both quantized and left out",
        "remove one",
    ),
    "an NVFP4 cache": (
        {"quant_algo": "FP8", "kv_cache_quant_algo": "NVFP4"},
        "only an FP8 cache",
        "write FP8, or null",
    ),
    "an INT8 cache": (
        {"quant_algo": "FP8", "kv_cache_scheme": {"num_bits": 8, "type": "int"}},
        "only an FP8 cache is supported, not `8 bits, int`",
        "write FP8",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_nothing_is_guessed(name: str, tmp_path: Path) -> None:
    """What is not read is refused by name, by `import` and `--like` in the same words."""
    said, message, advice = REFUSED[name]
    config = config_of("tiny") | {"quantization_config": {"quant_method": "modelopt"} | said}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    told: list[tuple[str, str, str | None]] = []
    for importing in (True, False):
        with pytest.raises(N3CError) as caught:
            if importing:
                run_import(tmp_path)
            else:
                spec_like(load_spec(SPECS / "tiny.toml")[0], tmp_path, None)
        (diagnostic,) = (item for item in caught.value.diagnostics if item.severity is Severity.ERROR)
        told.append((diagnostic.code, diagnostic.message, diagnostic.help))
    assert told[0] == told[1]
    code, text, help_ = told[0]
    assert code == "E0305"
    assert message in text
    assert advice in (help_ or "")


def test_two_files_that_differ_are_refused(tmp_path: Path) -> None:
    """Some readers take hf_quant_config.json, others config.json."""
    config = config_of("tiny") | {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for algorithm, refused in (("FP8", False), ("NVFP4", True), (None, True)):
        hf = {"quantization": {"quant_algo": algorithm, "kv_cache_quant_algo": "FP8"}}
        (tmp_path / "hf_quant_config.json").write_text(json.dumps(hf), encoding="utf-8")
        if not refused:
            assert run_import(tmp_path).spec.serving.kv_cache_dtype == "fp8"
            continue
        with pytest.raises(N3CError, match=r"hf_quant_config\.json and config\.json give different formats"):
            run_import(tmp_path)
        with pytest.raises(N3CError, match=r"hf_quant_config\.json and config\.json give different formats"):
            spec_like(load_spec(SPECS / "tiny.toml")[0], tmp_path, None)


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
