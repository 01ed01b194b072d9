"""`--like`: the map of a released checkpoint for another checkpoint of the same model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from n3c.compiler.quantization.calibration.activation_scales import ledger
from n3c.compiler.quantization.checkpoint_formats import spec_like
from n3c.ir.diagnostics import ExitCode, N3CError
from n3c.specs.load import load_spec
from n3c.specs.schema import Spec
from support.specs import SPECS, small_spec

CORRUPT = ".\0backbone.pt_name_sentinel"
"""What ModelOpt 0.47 puts behind every module name."""

MAP = {
    "backbone.layers.1.mixer.experts": "NVFP4",
    "backbone.layers.4.mixer.experts": "NVFP4",
    "backbone.layers.7.mixer.experts": "NVFP4",
    "backbone.layers.0.mixer.in_proj": "FP8",
    "backbone.layers.2.mixer.out_proj": "FP8",
    "backbone.layers.4.mixer.shared_experts.down_proj": "NVFP4",
}


def mixed(names: Mapping[str, str], suffix: str = "", **more: Any) -> dict[str, Any]:
    layers = {f"{name}{suffix}": {"quant_algo": algorithm} for name, algorithm in names.items()}
    return {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers, **more}


def write(path: Path, data: Mapping[str, Any]) -> Path:
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def formats(spec: Spec) -> dict[str, str]:
    """Return what is quantized, by module."""
    return {e.name.removesuffix(".weight"): e.format for e in ledger(spec) if e.format not in ("bf16", "f32")}


@pytest.mark.parametrize("suffix", ["", CORRUPT])
@pytest.mark.parametrize("where", ["hf_quant_config.json", "config.json", "elsewhere.json"])
def test_every_module_gets_the_format_of_the_map(tmp_path: Path, suffix: str, where: str) -> None:
    key = "quantization_config" if where == "config.json" else "quantization"
    file = write(tmp_path / where, {key: mixed(MAP, suffix, kv_cache_quant_algo="FP8")})
    spec, warnings = spec_like(small_spec(), file if where == "elsewhere.json" else tmp_path, None)
    assert not warnings
    assert spec.serving.kv_cache_dtype == "fp8"
    expected = {name: value.lower() for name, value in MAP.items() if not name.endswith(".experts")}
    for layer in (1, 4, 7):
        for half in ("up", "down"):
            expected[f"backbone.layers.{layer}.mixer.experts.*.{half}_proj"] = "nvfp4"
    assert formats(spec) == expected


def test_one_expert_linear_at_a_time_is_the_same(tmp_path: Path) -> None:
    single = {
        f"backbone.layers.{layer}.mixer.experts.{e}.{half}_proj": "NVFP4"
        for layer in (1, 4, 7)
        for e in range(8)
        for half in ("up", "down")
    }
    spec, _ = spec_like(small_spec(), write(tmp_path / "m.json", {"quantization": mixed(single)}), (16, 16))
    whole = {f"backbone.layers.{layer}.mixer.experts": "NVFP4" for layer in (1, 4, 7)}
    again, _ = spec_like(small_spec(), write(tmp_path / "n.json", {"quantization": mixed(whole)}), (16, 16))
    assert spec.quantization == again.quantization
    assert spec.quantization is not None
    assert spec.quantization.block == (16, 16)
    assert len(spec.quantization.rules) == 1


def test_the_map_of_super_as_released() -> None:
    """The irregular choice of AutoQuantize for the Super checkpoint: 40 layers of experts, 139 FP8 linears."""
    spec, _ = load_spec(SPECS / "super.toml")
    in_proj = "0 2 4 6 9 11 13 15 18 20 27 29 31 40 49 51 53 55 57 60 62 66 68 71 73 82 84 86"
    names = {f"backbone.layers.{i}.mixer.in_proj": "FP8" for i in in_proj.split()}
    names["backbone.layers.1.mixer.shared_experts.down_proj"] = "NVFP4"
    names |= {
        f"backbone.layers.{i}.mixer.experts": "NVFP4" for i, s in enumerate(spec.model.pattern.symbols) if s == "E"
    }
    like, warnings = _like_text(spec, {"quantization": mixed(names, CORRUPT)})
    found = formats(like)
    assert not warnings
    assert {name for name, value in found.items() if value == "fp8"} == {n for n, v in names.items() if v == "FP8"}
    assert sum(value == "nvfp4" for value in found.values()) == 81
    assert len(like.quantization.rules if like.quantization else ()) < 10


def _like_text(spec: Spec, data: Mapping[str, Any]) -> tuple[Spec, list[Any]]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return spec_like(spec, write(Path(folder) / "hf_quant_config.json", data), None)


def test_one_format_with_exclusions(tmp_path: Path) -> None:
    uniform = {
        "quant_algo": "NVFP4",
        "exclude_modules": ["lm_head" + CORRUPT, "backbone.layers.3*", "backbone.layers.2.mixer.in_proj"],
    }
    spec, _ = spec_like(small_spec(), write(tmp_path / "m.json", {"quantization": uniform}), None)
    found = formats(spec)
    assert "lm_head" not in found
    assert not any(name.startswith(("backbone.layers.3.", "mtp.")) for name in found)
    assert "backbone.layers.2.mixer.in_proj" not in found
    assert found["backbone.layers.0.mixer.in_proj"] == "nvfp4"


def test_names_that_the_model_lacks_are_a_warning(tmp_path: Path) -> None:
    names = {**MAP, "backbone.layers.90.mixer.in_proj": "FP8"}
    spec, warnings = spec_like(small_spec(), write(tmp_path / "m.json", {"quantization": mixed(names)}), None)
    assert [w.code for w in warnings] == ["W0303"]
    assert formats(spec)["backbone.layers.0.mixer.in_proj"] == "fp8"


@pytest.mark.parametrize(
    ("data", "code", "place"),
    [
        ({"quantization": mixed({"backbone.layers.90.mixer.in_proj": "FP8"})}, "E0406", "m.json:1:18"),
        ({"quantization": {"quant_algo": "INT3"}}, "E0305", "m.json:1:33"),
        ({"quantization": mixed({"a.b": "INT4_AWQ"})}, "E0305", "m.json:1:80"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "E0305", "m.json:1:42"),
        ({"model_type": "nemotron_h"}, "E0305", "m.json:1:1"),
    ],
)
def test_maps_that_cannot_be_used(tmp_path: Path, data: Mapping[str, Any], code: str, place: str) -> None:
    with pytest.raises(N3CError) as caught:
        spec_like(small_spec(), write(tmp_path / "m.json", data), None)
    (diagnostic,) = caught.value.diagnostics
    assert (diagnostic.code, str(diagnostic.span)) == (code, str(tmp_path / place))
    assert caught.value.exit_code is ExitCode.SPEC


def test_a_directory_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(N3CError, match=r"neither hf_quant_config\.json nor config\.json") as caught:
        spec_like(small_spec(), tmp_path, None)
    assert caught.value.exit_code is ExitCode.FILE
