"""Formats of a model whose spec says none: the published exclusions, visible as rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from n3c.compiler.quantization.calibration.activation_scales import entries_of, save_scales
from n3c.compiler.quantization.calibration.calibrate import Amax
from n3c.compiler.quantization.request import QuantizeRequest
from n3c.compiler.quantization.requested_formats import requested_formats
from n3c.compiler.quantization.units import find_linears
from n3c.passes.serving import serve
from n3c.specs.huggingface import export_config
from n3c.specs.load import load_spec
from n3c.specs.recipe import published_recipe
from n3c.specs.roles import match_roles
from n3c.specs.schema import Format, Quantization
from support.checkpoints import write_checkpoint
from support.command import Result, n3c, tree, write_small
from support.specs import QUANTIZED, SMALL, SPECS, small_spec

NAMED = "quantization.rules.0 (default exclusions)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a plain checkpoint, `hf`, one that n3c wrote, `own`, and the spec, `spec.toml`."""
    folder = tmp_path_factory.mktemp("defaults")
    write_checkpoint(folder / "hf", small_spec(), shards=1, with_spec=False)
    write_checkpoint(folder / "own", small_spec(), shards=1)
    (folder / "spec.toml").write_text(SMALL, encoding="utf-8")
    return folder


def by_role(out: Path) -> dict[str, set[tuple[str, str]]]:
    """Return the rules and formats of each role's weights."""
    found: dict[str, set[tuple[str, str]]] = {}
    for line in json.loads((out / "n3c_ledger.json").read_text())["weights"]:
        found.setdefault(line["role"], set()).add((line["rule"], line["format"]))
    return found


def notes(result: Result) -> list[dict[str, Any]]:
    return [found for found in result.data["diagnostics"] if found["code"] == "W0622"]


@pytest.mark.parametrize("where", ["spec", "hf", "own"])
def test_published_exclusions_are_kept_and_named(folder: Path, tmp_path: Path, where: str) -> None:
    spec = [folder / "spec.toml"] if where == "spec" else []
    weights = folder / ("hf" if where == "spec" else where)
    result = n3c("quantize", *spec, "--fmt", "nvfp4", "--weights", weights, "-o", tmp_path / "out", "--json")
    assert result.code == 0, result.err
    roles = by_role(tmp_path / "out")
    for role in ("moe.experts.up", "moe.experts.down", "mlp.up", "mlp.down"):
        assert roles[role] == {("quantization.format", "w4a16_nvfp4")}
    for role in ("lm_head", "embedding", "moe.latent_up", "attention.q_proj", "mamba.in_proj", "moe.shared.up"):
        assert roles[role] == {(NAMED, "bf16")}, role
    assert (NAMED, "bf16") in roles["moe.router"]
    assert {format_ for role in roles if role.startswith("mtp.") for _, format_ in roles[role]} <= {"bf16", "f32"}
    (note,) = notes(result)
    assert note["severity"] == "note"
    assert note["file"] == str(spec[0] if spec else weights / "config.json")
    assert "attention.*" in note["message"]
    assert "note[W0622]: the formats are those of the published recipe: nvfp4, but embedding, mamba.*, " in result.err
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["n3c"]["quantization"]["rules"][0]["format"] == "bf16"


def test_a_table_of_the_spec_wins(folder: Path, tmp_path: Path) -> None:
    table = '\n[quantization]\nformat = "nvfp4"\nblock = [1, 16]\n[[quantization.rules]]\nroles = ["mamba.conv1d"]\n'
    (tmp_path / "spec.toml").write_text(SMALL + table + 'format = "bf16"\n', encoding="utf-8")
    weights = ("--weights", folder / "hf", "-o", tmp_path / "out")
    result = n3c("quantize", tmp_path / "spec.toml", "--fmt", "nvfp4", *weights, "--json")
    assert result.code == 0, result.err
    assert notes(result) == []
    roles = by_role(tmp_path / "out")
    assert roles["attention.o_proj"] == {("quantization.format", "w4a16_nvfp4")}
    assert roles["mamba.conv1d"] == {("quantization.rules.0", "bf16")}


def test_an_override_is_a_table(folder: Path, tmp_path: Path) -> None:
    override = ("--set", "quantization.block=[1,16]", "--set", "quantization.format=bf16")
    weights = ("--weights", folder / "hf", "-o", tmp_path / "out")
    result = n3c("quantize", folder / "spec.toml", *weights, *override, "--json")
    assert result.code == 0, result.err
    assert notes(result) == []
    assert by_role(tmp_path / "out")["mlp.up"] == {("quantization.format", "bf16")}


def test_what_is_written_as_a_spec_gives_the_same_checkpoint(folder: Path, tmp_path: Path) -> None:
    weights = ("--weights", folder / "hf")
    first = n3c("quantize", *weights, "-o", tmp_path / "a", "--write-spec", tmp_path / "spec.toml", "--block", "16x16")
    assert first.code == 0, first.err
    spec, _ = load_spec(tmp_path / "spec.toml")
    assert spec.quantization is not None
    assert spec.quantization.block == (16, 16)
    second = n3c("quantize", tmp_path / "spec.toml", *weights, "-o", tmp_path / "b", "--json")
    assert second.code == 0, second.err
    assert notes(second) == []
    one, other = tree(tmp_path / "a"), tree(tmp_path / "b")
    assert one["model.safetensors"] == other["model.safetensors"]
    assert one["hf_quant_config.json"] == other["hf_quant_config.json"]


def test_with_activation_scales_mamba_and_shared_experts_are_fp8(folder: Path, tmp_path: Path) -> None:
    inputs = {linear.module: 2.0 for linear in find_linears(small_spec())}
    save_scales(tmp_path / "scales.json", entries_of(Amax(inputs, {})))
    scales = ("--activation-scales", tmp_path / "scales.json")
    result = n3c("quantize", "--weights", folder / "hf", "-o", tmp_path / "out", *scales, "--json")
    assert result.code == 0, result.err
    assert "W0621" not in [found["code"] for found in result.data["diagnostics"]]  # nothing lacks a scale
    roles = by_role(tmp_path / "out")
    assert roles["mamba.out_proj"] == roles["moe.shared.up"] == {("quantization.rules.0 (default FP8)", "fp8")}
    assert roles["moe.experts.up"] == {("quantization.format", "nvfp4")}
    assert roles["lm_head"] == {("quantization.rules.1 (default exclusions)", "bf16")}


def test_a_choice_from_elsewhere_is_no_default(folder: Path, tmp_path: Path) -> None:
    auto = ("--auto", "--effective-bits", 6)
    result = n3c("quantize", folder / "spec.toml", "--weights", folder / "hf", "-o", tmp_path / "out", *auto, "--json")
    assert result.code == 0, result.err
    assert notes(result) == []
    assert not any("default" in rule for rules in by_role(tmp_path / "out").values() for rule, _ in rules)


@pytest.mark.parametrize(
    ("format_", "calibrated", "expected"),
    [
        ("nvfp4", True, {"default FP8": "fp8", "default exclusions": "bf16"}),
        ("w4a16_nvfp4", False, {"default exclusions": "bf16"}),
        ("fp8", False, {"default exclusions": "bf16"}),
    ],
)
def test_rules_name_only_what_the_model_has(
    tmp_path: Path, format_: Format, calibrated: bool, expected: dict[str, str]
) -> None:
    spec, _ = load_spec(write_small(tmp_path))
    recipe = published_recipe(spec, format_, calibrated=calibrated)
    assert dict(zip(recipe.names, (rule.format for rule in recipe.table.rules), strict=True)) == expected
    for name in ("nano", "nano-4b"):  # without latent experts and MTP; without experts
        spec, _ = load_spec(SPECS / f"{name}.toml")
        table = published_recipe(spec, format_, calibrated=calibrated).table
        named = {role for rule in table.rules for role in rule.roles}
        assert not any(role.startswith(("mtp.", "moe.latent")) for role in named)
        assert any(role.startswith("moe.") for role in named) == (name == "nano")


def test_the_exclusions_are_those_of_the_shipped_specs() -> None:
    for name in ("super", "ultra"):
        spec, _ = load_spec(SPECS / f"{name}.toml")
        assert spec.quantization is not None
        table = published_recipe(spec, "nvfp4", spec.quantization.block).table
        for ours, theirs in zip(table.rules, spec.quantization.rules, strict=True):
            assert (ours.format, match_roles(ours.roles)) == (theirs.format, match_roles(theirs.roles))


def test_weights_that_no_block_divides_stay_bf16(tmp_path: Path) -> None:
    loaded, _ = load_spec(write_small(tmp_path), ["mlp.intermediate_size=104", "moe.intermediate_size=56"])
    recipe = published_recipe(loaded, calibrated=False)
    assert recipe.names_by_path["quantization.rules.1"] == "default: no whole blocks"
    assert recipe.table.rules[1].roles == ("moe.experts.down", "mlp.down")
    table = published_recipe(loaded, "nvfp4", (16, 16), calibrated=False).table
    assert set(table.rules[1].roles) == {"moe.experts.down", "moe.experts.up", "mlp.down", "mlp.up"}


CONFIGS: dict[str, dict[str, object]] = {
    "as it is": {},
    "standard experts, none shared": {
        "moe_latent_size": None,
        "n_shared_experts": 0,
        "moe_shared_expert_intermediate_size": 0,
    },
    "without MTP": {"num_nextn_predict_layers": 0},
    "a tied head": {"tie_word_embeddings": True},
    "an odd expert": {"moe_intermediate_size": 56},
    "an odd MLP": {"intermediate_size": 100},
}


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("block", ["1x16", "16x16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_import_and_quantize_give_one_recipe(tmp_path: Path, name: str, block: str, calibrated: bool) -> None:
    """`import` then `quantize SPEC` gives the formats of `quantize` without a spec: there is one recipe."""
    config = export_config(small_spec())
    del config["n3c"]
    (tmp_path / "config.json").write_text(json.dumps(config | CONFIGS[name]))
    assert n3c("import", tmp_path, "-o", tmp_path / "spec.toml").code == 0
    scales = tmp_path / "scales.json" if calibrated else None
    tables: list[Quantization | None] = []
    for spec in (None, tmp_path / "spec.toml"):
        request = QuantizeRequest(tmp_path, tmp_path / "out", spec=spec, block=block, activation_scales=scales)
        asked = requested_formats(request)
        assert [note.code for note in asked.notes_for(asked.spec)[1]] == ["W0622"]
        serve(asked.spec)  # the passes take them
        tables.append(asked.spec.quantization)
    assert tables[0] == tables[1]


def test_formats_that_somebody_chose_are_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(export_config(small_spec(QUANTIZED))))
    assert n3c("import", tmp_path, "-o", tmp_path / "spec.toml").code == 0
    for spec in (None, tmp_path / "spec.toml"):
        asked = requested_formats(QuantizeRequest(tmp_path, tmp_path / "out", spec=spec))
        assert asked.recipe is None
        assert asked.spec.quantization == small_spec(QUANTIZED).quantization
