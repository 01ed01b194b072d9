"""config.json to spec and back, against transformers' own NemotronHConfig."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from n3c.ir.diagnostics import ExitCode, N3CError
from n3c.specs import json_places
from n3c.specs.convert import config_text, run_import
from n3c.specs.dump import dump_spec
from n3c.specs.huggingface import export_config, import_config
from n3c.specs.huggingface_names import MTP_PATTERN_LISTS, PATTERN_LISTS
from n3c.specs.json_places import parse_json
from n3c.specs.load import load_spec, parse_spec
from n3c.specs.schema import Rule, Spec
from support.golden import assert_golden
from support.random_specs import specs

SPECS = Path(__file__).parents[2] / "specs"
NAMES = sorted(path.stem for path in SPECS.glob("*.toml"))

# What a transformers config carries that a model does not use.
DEAD = {
    "expand",
    "hidden_dropout",
    "moe_shared_expert_overlap",
    "residual_in_fp32",
    "sliding_window",
    "time_step_limit",
    "use_mamba_kernels",
}


def nemotron_h_config() -> Any:
    from transformers import NemotronHConfig

    return NemotronHConfig


def read(text: str, name: str = "config.json") -> tuple[Spec, list[str]]:
    config, places = parse_json(text, name)
    spec, warnings = import_config(config, places, "imported")
    return spec, [item.code for item in warnings]


def round_trip(spec: Spec) -> None:
    text = config_text(spec)
    assert read(text) == (spec, [])
    if not all(kind.in_transformers for kind in spec.model.pattern):
        return
    # ... and what transformers makes of it
    hugging_face = nemotron_h_config().from_dict(json.loads(text))
    assert hugging_face.hybrid_override_pattern == spec.model.pattern.symbols
    assert hugging_face.num_hidden_layers == len(spec.model.pattern)
    again, codes = read(hugging_face.to_json_string(use_diff=False))
    assert again == spec
    assert codes == ["W0301"]


@pytest.mark.parametrize("name", NAMES)
def test_shipped_specs_round_trip(name: str) -> None:
    round_trip(load_spec(SPECS / f"{name}.toml")[0])


@settings(max_examples=20)
@given(specs())
def test_random_specs_round_trip(spec: Spec) -> None:
    round_trip(spec)


def test_export_says_what_each_reader_needs() -> None:
    config = export_config(load_spec(SPECS / "super.toml")[0])
    assert config["architectures"] == ["NemotronHForCausalLM"]
    assert config["num_hidden_layers"] == len(config["hybrid_override_pattern"]) == 88
    assert not {*PATTERN_LISTS, *MTP_PATTERN_LISTS} & set(config)
    assert config["mtp_hybrid_override_pattern"] == "*E"
    assert (config["num_nextn_predict_layers"], config["mtp_num_layers"]) == (1, 2)
    assert (config["n_groups"], config["mamba_n_groups"], config["n_group"]) == (8, 8, 1)
    assert config["eos_token_id"] == [2, 11]
    assert config["n_shared_experts"] == 1


@settings(max_examples=10)
@given(
    st.lists(
        st.sampled_from(["linear_attention", "mamba", "moe", "full_attention", "attention", "mlp"]),
        min_size=1,
        max_size=6,
    ),
    st.integers(1, 300),
    st.none() | st.integers(1, 64),
    st.booleans(),
)
def test_configs_saved_by_transformers(layers: list[str], hidden: int, latent: int | None, mtp: bool) -> None:
    made = nemotron_h_config()(
        hidden_size=hidden,
        layers_block_type=layers,
        moe_latent_size=latent,
        num_nextn_predict_layers=int(mtp),
        n_routed_experts=12,
        n_group=3,
        topk_group=2,
        num_experts_per_tok=5,
        eos_token_id=[3, 4],
        pad_token_id=None,
        dtype="float32",
    )
    for use_diff in (True, False):
        text = made.to_json_string(use_diff=use_diff)
        config, places = parse_json(text, "config.json")
        spec, warnings = import_config(config, places, "random")
        assert [item.code for item in warnings][-2:] == ["W0301", "W0622"]
        assert spec.model.pattern.symbols == made.hybrid_override_pattern
        assert spec.model.hidden_size == hidden
        assert spec.model.eos_token_ids == (3, 4)
        assert spec.model.pad_token_id is None
        assert (spec.mtp is not None) == mtp
        assert (spec.serving.kv_cache_dtype, spec.serving.conv_state_dtype) == ("fp32", "fp32")
        if "moe" in layers:
            assert spec.moe is not None
            assert (spec.moe.latent_size, spec.moe.n_group) == (latent, 3)
        again = parse_spec(dump_spec(spec), "again.toml")[0]
        assert again == spec
        assert read(config_text(spec))[0] == spec


def test_saved_checkpoint_folder(tmp_path: Path) -> None:
    folder = tmp_path / "My Model (v2)"
    nemotron_h_config()(layers_block_type=["mamba", "mlp"], hidden_size=64).save_pretrained(folder)
    imported = run_import(folder)
    assert imported.spec.name == "my-model-v2"
    assert parse_spec(imported.text, "x")[0] == imported.spec
    assert run_import(folder / "config.json").spec == imported.spec
    message = imported.warnings[-2].message
    assert message.startswith("dropped, as the model does not use them: ")
    assert set(message.partition(": ")[2].split(", ")) == DEAD


OLD: dict[str, Any] = {
    "architectures": ["NemotronHForCausalLM"],
    "model_type": "nemotron_h",
    "torch_dtype": "bfloat16",
    "num_hidden_layers": None,
    "hybrid_override_pattern": "ME*-",
    "hidden_size": 64,
    "vocab_size": 128,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.01,
    "tie_word_embeddings": False,
    "rescale_prenorm_residual": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": None,
    "attention_head_dim": 16,
    "intermediate_size": 96,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "mamba_state_dim": 32,
    "mamba_n_groups": 2,
    "mamba_d_conv": 3,
    "mamba_expand": 2,
    "mamba_dt_min": 0.01,
    "mamba_dt_max": 0.2,
    "mamba_dt_init_floor": 0.001,
    "mamba_conv_bias": False,
    "mamba_chunk_size": 16,
    "mamba_ssm_cache_dtype": "float16",
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 48,
    "moe_latent_size": 16,
    "routed_scaling_factor": 2,
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "num_nextn_predict_layers": 1,
    "mtp_hybrid_override_pattern": "*E",
    "rope_theta": 10000,
    "partial_rotary_factor": 1.0,
}


def test_old_names() -> None:
    spec, codes = read(json.dumps(OLD))
    assert codes == ["W0302", "W0301", "W0622"]
    assert spec.mamba is not None
    m = spec.mamba
    assert (m.state_size, m.n_groups, m.conv_kernel, m.chunk_size, m.conv_bias) == (32, 2, 3, 16, False)
    assert (m.time_step_min, m.time_step_max, m.time_step_floor) == (0.01, 0.2, 0.001)
    assert spec.attention is not None
    assert (spec.attention.num_kv_heads, spec.attention.head_dim) == (4, 16)
    assert spec.moe is not None
    assert spec.moe.num_experts == 8
    assert spec.model.norm_eps == 1e-6
    assert spec.serving.ssm_state_dtype == "fp16"
    assert spec.mtp is not None
    assert (spec.mtp.pattern.symbols, spec.mtp.depth) == ("*E", 1)


def test_spans_are_in_the_json() -> None:
    config, places = parse_json(json.dumps(OLD, indent=1), "c.json")
    spec, _ = import_config(config, places, "x")
    lines = json.dumps(OLD, indent=1).split("\n")
    for path, word in (
        ("moe.top_k", "num_experts_per_tok"),
        ("mamba.n_groups", "mamba_n_groups"),
        ("mtp.pattern", "mtp_h"),
    ):
        span = spec.span(path)
        assert span is not None
        assert word in lines[span.line - 1]
    span = spec.span("model.pattern.2")
    assert span is not None
    assert (span.source or "")[span.column - 1] == "*"


def test_policy_without_quantization() -> None:
    spec, _ = read(json.dumps(OLD))
    assert spec.quantization is not None
    assert (spec.quantization.format, spec.quantization.block) == ("nvfp4", (1, 16))
    assert spec.quantization.rules == (
        Rule("fp8", ("mamba.in_proj", "mamba.out_proj", "moe.shared.*")),
        Rule(
            "bf16",
            ("embedding", "mamba.conv1d", "moe.router", "moe.latent_*", "attention.*", "lm_head", "mtp.*"),
        ),
    )
    assert spec.training is None


def test_policy_leaves_odd_widths() -> None:
    spec, _ = read(json.dumps(OLD | {"moe_latent_size": 24, "intermediate_size": 100}))
    assert spec.quantization is not None
    kept = spec.quantization.rules[-1].roles
    assert {"moe.experts.up", "mlp.down"} <= set(kept)
    assert "moe.experts.down" not in kept


def test_missing_fields_are_those_of_transformers() -> None:
    text = json.dumps({"model_type": "nemotron_h", "hybrid_override_pattern": "ME*-"})
    spec, codes = read(text)
    assert codes == ["W0302", "W0622"]
    made = nemotron_h_config()(hybrid_override_pattern="ME*-")
    again, _ = read(made.to_json_string(use_diff=False))
    assert spec == again


def test_what_is_put_in_is_told() -> None:
    """Every default, with its value: of the trunk, of MTP, whose depth and loss scale configs often lack, of states."""
    text = json.dumps({"model_type": "nemotron_h", "hybrid_override_pattern": "M*", "num_nextn_predict_layers": 1})
    config, places = parse_json(text, "config.json")
    _, (told, note) = import_config(config, places, "x")
    said = told.message.removeprefix("not given, so taken by default: ").split(", ")
    wanted = ("hidden_size 4096", 'mtp_hybrid_override_pattern "*E"', "mtp_num_layers 1", "n_routed_experts 8")
    assert {*wanted, "mtp_loss_scaling_factor 0.1", 'mamba_ssm_cache_dtype "float32"'} <= set(said)
    assert not any(name.startswith("intermediate_size") for name in said)  # of a block that the model lacks
    assert note.message.startswith("the formats are those of the published recipe: nvfp4, but mamba.")


def test_no_shared_expert() -> None:
    spec, _ = read(json.dumps(OLD | {"n_shared_experts": 0, "moe_shared_expert_intermediate_size": 0}))
    assert spec.moe is not None
    assert spec.moe.shared_intermediate_size == 0
    assert export_config(spec)["n_shared_experts"] == 0


@pytest.mark.parametrize(
    ("outer", "read_as"), [("nemotron_h_omni", True), ("NemotronH_Nano_VL_V2", True), ("llava", False)]
)
def test_a_nested_text_model_without_a_type(outer: str, read_as: bool, tmp_path: Path) -> None:
    """Of Super-VL and Omni the type of the whole says it; of other models nothing is guessed."""
    inner = {key: value for key, value in OLD.items() if key != "model_type"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": outer, "llm_config": inner}))
    if read_as:
        expected, _ = read(json.dumps(OLD))
        assert run_import(tmp_path / "config.json").spec.model == expected.model
        return
    with pytest.raises(N3CError, match=f"`model_type` is `{outer}`"):
        run_import(tmp_path / "config.json")


def test_megatron_depth_is_read() -> None:
    spec, _ = read(json.dumps(OLD | {"mtp_num_layers": 2, "mtp_loss_scaling_factor": 0.3}))
    assert spec.mtp is not None
    assert (spec.mtp.depth, spec.mtp.loss_scaling_factor) == (2, 0.3)


@pytest.mark.parametrize("rest", ["}", "} {", ", x: 1}", ', "b": tru}', ""])
def test_a_name_given_twice(rest: str) -> None:
    """It is found before what comes behind it is looked at."""
    text = '{"a": {"b\\u0063": 1,\n "bc": 2}' + rest
    with pytest.raises(N3CError) as caught:
        parse_json(text, "c.json")
    (found,) = caught.value.diagnostics
    assert (found.code, found.message, str(found.span)) == ("E0303", "`bc` is given twice", "c.json:2:2")


@pytest.mark.parametrize("blocks", [60, 61])
def test_patterns_that_differ(blocks: int) -> None:
    """Both are told, one of more than 60 characters by its beginning."""
    pattern = "M"
    while len(pattern) < blocks:  # of nothing that repeats, which would be told in short
        pattern = "".join({"M": "ME-", "E": "M-", "-": "E"}[symbol] for symbol in pattern)
    pattern = pattern[:blocks]
    said = f"`{pattern}`" if blocks == 60 else f"61 blocks `{pattern[:40]}...`"
    text = json.dumps(OLD | {"hybrid_override_pattern": pattern, "layers_block_type": ["mamba"]})
    with pytest.raises(N3CError) as caught:
        read(text)
    (found,) = [item for item in caught.value.diagnostics if item.code == "E0303" and "`layers" in item.message]
    assert found.message == f"`hybrid_override_pattern` is {said}, but `layers_block_type` is `M`"


ERRORS: dict[str, dict[str, Any]] = {
    "not_nemotron": {"model_type": "llama"},
    "no_pattern": {"hybrid_override_pattern": None},
    "layer_count": {"num_hidden_layers": 5},
    "two_patterns": {"layers_block_type": ["mamba", "moe", "attention", "attention"]},
    "unknown_block": {"hybrid_override_pattern": None, "layers_block_type": ["mamba", "gru"]},
    "bad_symbol": {"hybrid_override_pattern": "ME*+"},
    "pattern_type": {"hybrid_override_pattern": ["M"]},
    "features": {
        "use_bias": True,
        "mlp_bias": True,
        "attention_bias": True,
        "mlp_hidden_act": "silu",
        "mamba_hidden_act": "gelu",
        "attention_dropout": 0.1,
        "block_configs": [{}],
    },
    "shared_experts": {"n_shared_experts": 2},
    "two_names": {"n_groups": 4, "layer_norm_epsilon": 1e-5},
    "physical_mtp": {"num_nextn_predict_layers": 2},
    "mtp_block": {"mtp_hybrid_override_pattern": "M*"},
    "types": {"hidden_size": "64", "vocab_size": None, "n_group": 1.5, "mamba_ssm_cache_dtype": "int8"},
    "consistency": {"num_experts_per_tok": 9, "mamba_n_groups": 3, "eos_token_id": [2, 999]},
    "huge": {"num_local_experts": 10**30, "hidden_size": 10**400},
    "own": {"n3c": {"name": "Bad Name", "quantisation": {}, "serving": {"batch": 1}}},
    "own_cuts": {"n3c": {"pipeline_cuts": [9]}},
    "own_type": {"n3c": []},
    "quantization_method": {"quantization_config": {"quant_method": "gptq"}},
    "quantization_algorithm": {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP8"}},
}


@pytest.mark.parametrize("name", ERRORS)
def test_error(name: str) -> None:
    text = json.dumps(OLD | ERRORS[name], indent=1)
    with pytest.raises(N3CError) as caught:
        read(text, f"{name}.json")
    assert caught.value.exit_code is ExitCode.SPEC
    assert_golden(f"import/{name}.txt", "\n".join(item.render() for item in caught.value.diagnostics) + "\n")


def test_bad_files(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    for content, code in (
        (b"{", "E0301"),
        (b"[]", "E0301"),
        (b"\xff", "E0100"),
        (b'{"a": ' + b"[" * 100_000, "E0301"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "E0301"),
        (b'{"model_type": "nemotron_h", "model_type": "nemotron_h"}', "E0303"),
    ):
        file.write_bytes(content)
        with pytest.raises(N3CError) as caught:
            run_import(file)
        assert caught.value.exit_code is ExitCode.SPEC
        assert caught.value.diagnostics[0].code == code
        assert caught.value.diagnostics[0].span is not None
    with pytest.raises(N3CError) as caught:
        run_import(tmp_path / "none")
    assert caught.value.exit_code is ExitCode.FILE


def test_the_number_of_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The places of values take more memory than the values: a config has a limit of its own."""
    file = tmp_path / "config.json"
    file.write_text('{"a": [1, 2, 3, 4]}', encoding="utf-8")  # 2 brackets and 3 commas
    monkeypatch.setattr(json_places, "MAX_VALUES", 5)
    parse_json(file.read_text(encoding="utf-8"), str(file))
    monkeypatch.setattr(json_places, "MAX_VALUES", 4)
    with pytest.raises(N3CError) as caught:
        run_import(file)
    (found,) = caught.value.diagnostics
    assert (found.code, found.message) == ("E0301", "not readable: it has more than 4 values")


@settings(max_examples=50)
@given(
    st.sampled_from(sorted(OLD)),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=5,
    ),
)
def test_any_value_is_read_or_refused(key: str, value: Any) -> None:
    try:
        read(json.dumps(OLD | {key: value}))
    except N3CError as error:
        assert all(item.span is not None for item in error.diagnostics)
