"""`n3c diff`: what it finds in specs, checkpoints and builds that differ in one known thing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from n3c.compiler import diff
from n3c.specs.load import load_spec
from support.checkpoints import write_checkpoint
from support.command import n3c, write_small
from support.specs import QUANTIZED, SMALL, SPECS


def compared(a: object, b: object, *more: object) -> dict[str, Any]:
    result = n3c("diff", a, b, "--json", *more)
    assert result.code == 0, result.err
    return result.data


@pytest.fixture
def specs(tmp_path: Path) -> tuple[Path, Path]:
    """Write a spec, and one where the formats of the shared experts are others."""
    a = write_small(tmp_path, extra=QUANTIZED)
    b = tmp_path / "other.toml"
    b.write_text(SMALL.lstrip() + QUANTIZED.replace('layers = "last 4"\n', ""), encoding="utf-8")
    return a, b


def test_a_thing_does_not_differ_from_itself(specs: tuple[Path, Path], tmp_path: Path) -> None:
    for a, b in (("super", "super"), (specs[0], specs[0])):
        assert compared(a, b)["equal"] is True
        assert n3c("diff", a, b, "--exit-code").code == 0
        assert n3c("diff", a, b).out.endswith("\nno differences\n")
    write_checkpoint(tmp_path / "weights", load_spec(specs[0])[0], shards=1)
    found = compared(tmp_path / "weights", tmp_path / "weights")
    assert (found["equal"], found["tensors"]["changed"]) == (True, [])
    assert found["tensors"]["equal"] > 50


def test_a_rule_changes_the_blocks_that_it_reaches(specs: tuple[Path, Path]) -> None:
    found = compared(*specs)
    assert found["equal"] is False
    assert n3c("diff", *specs, "--exit-code").code == 5
    (rule,) = found["spec"]
    assert rule["key"] == "quantization.rules"
    assert ('layers = "last 4"' in rule["a"], 'layers = "last 4"' in rule["b"]) == (True, False)
    (blocks,) = found["blocks"]  # layers 1 and 4 of MEM*E-ME; of the last four 7 alone has experts
    assert blocks["a"] == blocks["b"] == ["backbone.layers.1"]
    assert blocks["what"] == ["mixer.shared_experts.up_proj.weight nvfp4 → bf16"]
    figures = {change["figure"]: change for change in found["figures"]}
    assert figures["weights.bytes"]["b"] > figures["weights.bytes"]["a"]
    assert "parameters.total" not in figures
    text = n3c("diff", *specs).out
    assert "mixer.shared_experts.up_proj.weight nvfp4 → bf16" in text


def test_blocks_are_aligned_where_layers_are_added(tmp_path: Path) -> None:
    a = write_small(tmp_path)
    (tmp_path / "b.toml").write_text(SMALL.lstrip().replace('"MEM*E-ME"', '"MEM*E-MEM*"'), encoding="utf-8")
    found = compared(a, tmp_path / "b.toml")
    assert [(block["a"], block["b"]) for block in found["blocks"]] == [
        ([], ["backbone.layers.8"]),
        ([], ["backbone.layers.9"]),
    ]
    assert {change["key"]: (change["a"], change["b"]) for change in found["spec"]} == {
        "model.pattern": ('"MEM*E-ME"', '"MEM*E-MEM*"')
    }
    assert found["ir"] == []


def test_sizes_change_shapes_figures_and_ir(tmp_path: Path) -> None:
    a = write_small(tmp_path)
    (tmp_path / "b.toml").write_text(SMALL.lstrip().replace("num_kv_heads = 2", "num_kv_heads = 4"), encoding="utf-8")
    found = compared(a, tmp_path / "b.toml")
    what = [line for block in found["blocks"] for line in block["what"]]
    assert "mixer.k_proj.weight [32, 64] → [64, 64]" in what
    assert any(line.startswith("KV a token") for line in what)
    changed = {function["function"]: function["lines"] for function in found["ir"]}
    assert set(changed) >= {"attention", "attention.prefill"}
    assert any(line.startswith("+    state %") for line in changed["attention"])
    assert "num_kv_heads  2 → 4" in n3c("diff", a, tmp_path / "b.toml").out
    assert "      +    state %" in n3c("diff", a, tmp_path / "b.toml", "--ir").out


def test_weights_are_compared_by_name_shape_and_value(tmp_path: Path) -> None:
    spec = load_spec(write_small(tmp_path))[0]
    write_checkpoint(tmp_path / "a", spec, shards=2)
    tensors = {k: v for file in (tmp_path / "a").glob("*.safetensors") for k, v in load_file(file).items()}
    changed = dict(tensors)
    scaled, shorter, gone = "backbone.layers.0.mixer.in_proj.weight", "backbone.norm_f.weight", "lm_head.weight"
    changed[scaled] = tensors[scaled] * 1.5
    changed[shorter] = tensors[shorter][:-1]
    del changed[gone]
    changed["new.weight"] = torch.ones(3)
    write_checkpoint(tmp_path / "b", spec, shards=1, tensors=changed)
    found = compared(tmp_path / "a", tmp_path / "b")["tensors"]
    assert (found["only_a"], found["only_b"]) == ([gone], ["new.weight"])
    assert found["equal"] == len(tensors) - 3
    by_name = {weight["name"]: weight for weight in found["changed"]}
    assert set(by_name) == {scaled, shorter}
    values = by_name[scaled]["values"]
    assert values["relative_error"] == pytest.approx(0.25, rel=1e-3)
    assert values["largest"] == pytest.approx(float(tensors[scaled].float().abs().max()) / 2, rel=1e-2)
    assert values["rms_b"] == pytest.approx(1.5 * values["rms_a"], rel=1e-3)
    assert by_name[shorter]["shape"] == [[64], [63]]
    assert by_name[shorter]["values"] is None
    quick = compared(tmp_path / "a", tmp_path / "b", "--headers-only")["tensors"]
    assert [weight["name"] for weight in quick["changed"]] == [shorter]


def test_a_quantized_checkpoint_against_its_source_has_the_error_that_quantize_reports(tmp_path: Path) -> None:
    spec = write_small(tmp_path, extra=QUANTIZED)
    write_checkpoint(tmp_path / "a", load_spec(spec)[0], shards=1)
    quantized = n3c("quantize", spec, "--weights", tmp_path / "a", "-o", tmp_path / "b", "--json").data
    found = compared(tmp_path / "a", tmp_path / "b")["tensors"]
    reported = {entry["format"]: entry["relative_error"] for entry in quantized["relative_error"]}
    assert {weight["format"][1] for weight in found["changed"]} == {"fp8", "w4a16_nvfp4"}
    for weight in found["changed"]:
        expected = reported[weight["format"][1]]
        assert weight["values"]["relative_error"] == pytest.approx(expected, rel=0.5)
    assert "→ w4a16_nvfp4" in n3c("diff", tmp_path / "a", tmp_path / "b").out


def test_builds_are_compared_by_options_and_files(specs: tuple[Path, Path], tmp_path: Path) -> None:
    for spec, out, target in ((specs[0], "a", "onnx"), (specs[1], "b", "onnx"), (specs[1], "c", "torch")):
        assert n3c("build", spec, "--target", target, "-o", tmp_path / out).code == 0
    changes = {change["key"]: change for change in compared(tmp_path / "a", tmp_path / "b")["build"]}
    assert {"spec.toml", "onnx/decode.onnx"} <= set(changes)
    assert not [key for key in changes if key.startswith("tools.")]
    others = {change["key"]: change for change in compared(tmp_path / "b", tmp_path / "c")["build"]}
    assert set(others) == {"builds.onnx", "builds.torch"}


def test_a_spec_a_checkpoint_and_a_build_are_compared_as_specs(specs: tuple[Path, Path], tmp_path: Path) -> None:
    assert n3c("build", specs[0], "--target", "torch", "-o", tmp_path / "out").code == 0
    found = compared(specs[0], tmp_path / "out")
    assert (found["equal"], found["a"]["kind"], found["b"]["kind"]) == (True, "spec", "build")


def test_the_function_is_the_command() -> None:
    found = diff(SPECS / "tiny.toml", SPECS / "tiny-moe.toml").as_json()
    data = compared("tiny", "tiny-moe")
    assert {key: found[key] for key in ("spec", "figures", "ir")} == {k: data[k] for k in ("spec", "figures", "ir")}


def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    assert n3c("diff", "super", tmp_path / "none.toml").code == 6
    assert n3c("diff", "super").code == 2
