"""`n3c inspect`: figures of the published models, against numbers that others have published or that shapes give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from n3c.compiler.report.units import format_bytes, format_count
from support.command import n3c, write_small
from support.specs import QUANTIZED, SPECS


def inspected(spec: str | Path, *more: object) -> dict[str, Any]:
    result = n3c("inspect", SPECS / spec, "--json", *more)
    assert result.code == 0, result.err
    return result.data


@pytest.mark.parametrize(
    ("spec", "total", "tolerance"),
    [
        ("nano", 31_577_937_344, 0.0),
        ("super", 120_668_687_360, 0.0),
        ("ultra", 549.3e9, 1e-3),
        ("nano-4b", 3.974e9, 1e-3),
        ("nemotron-nano-9b-v2", 8.888e9, 1e-3),
        ("nemotron-h-8b", 8.101e9, 1e-3),
    ],
)
def test_parameters_of_the_published_models(spec: str, total: float, tolerance: float) -> None:
    parameters = inspected(f"{spec}.toml")["parameters"]
    assert parameters["total"] == pytest.approx(total, rel=tolerance, abs=0)
    assert sum(parameters["by_role"].values()) == parameters["total"] + parameters["mtp"]
    assert parameters["active"] <= parameters["total"]


@pytest.mark.parametrize(
    ("spec", "active", "kv_bytes", "state_bytes"),
    [
        ("nano", 3.5e9, 6_144, 49_082_368),
        ("super", 12.7e9, 8_192, 170_229_760),
        ("ultra", 55e9, 12_288, 407_961_600),
    ],
)
def test_active_parameters_and_states(spec: str, active: float, kv_bytes: int, state_bytes: int) -> None:
    figures = inspected(f"{spec}.toml", "--set", "serving.kv_cache_dtype=bf16")
    assert figures["parameters"]["active"] == pytest.approx(active, rel=0.03)
    state = figures["state"]
    assert state["kv_bytes_per_token"] == kv_bytes
    assert state["bytes_per_request"] == state_bytes
    assert state["ssm_bytes_per_request"] + state["conv_bytes_per_request"] == state_bytes


def test_flops_are_two_a_parameter_that_works_on_a_token_and_grow_with_the_context() -> None:
    short, long = (inspected("super.toml", "--context", n)["flops_per_token"] for n in (1, 8193))
    assert long - short == 8192 * 4 * 8 * 32 * 128  # tokens, FLOPs, attention layers, heads, width
    parameters = inspected("super.toml")["parameters"]
    multiplied = parameters["active"] - parameters["by_role"]["embedding"]
    assert 2 * multiplied < short < 2.2 * multiplied  # the rest is convolution and the SSD recurrence


def test_weight_bytes_by_format_add_up(tmp_path: Path) -> None:
    weights = inspected("super.toml")["weights"]
    assert sum(weights["by_format"].values()) == weights["bytes"]
    experts = 40 * 512 * 2 * 2688 * 1024
    codes_and_scales = experts // 2 + experts // 16 + 4 * 40 * 512 * 2
    assert weights["by_format"]["nvfp4"] == codes_and_scales
    plain = inspected(write_small(tmp_path))["weights"]["bytes"]
    quantized = inspected(write_small(tmp_path, extra=QUANTIZED))["weights"]["bytes"]
    assert quantized < 0.75 * plain


def test_the_batch_scales_states_and_not_weights_that_all_read() -> None:
    one, eight = (inspected("super.toml", "--batch", n)["decode"] for n in (1, 8))
    assert eight["bytes"]["states"] == 8 * one["bytes"]["states"]
    assert eight["bytes"]["kv_cache"] == 8 * one["bytes"]["kv_cache"]
    assert one["bytes"]["weights"] < eight["bytes"]["weights"] < 8 * one["bytes"]["weights"]
    assert eight["flops"] == 8 * one["flops"]


def test_a_config_and_a_checkpoint_give_the_figures_of_their_spec(tmp_path: Path) -> None:
    assert n3c("export-config", SPECS / "super.toml", "-o", tmp_path / "config.json").code == 0
    expected = inspected("super.toml")
    for path in (tmp_path, tmp_path / "config.json"):
        found = inspected(path)
        assert found["parameters"] == expected["parameters"]
        assert (
            found["flops_per_token"]
            == inspected("super.toml", "--context", found["decode"]["context"])["flops_per_token"]
        )


def test_text_for_people(tmp_path: Path) -> None:
    text = n3c("inspect", SPECS / "super.toml").out
    assert "nemotron-3-super-120b-a12b: 88 layers (40 mamba, 40 moe, 8 attention)" in text
    assert "120,668,687,360 (120.67B) without MTP" in text
    out = tmp_path / "out"
    assert n3c("build", write_small(tmp_path, extra=QUANTIZED), "--target", "torch", "-o", out).code == 0
    text = n3c("inspect", out).out
    assert text.startswith(f"{out}: small (spec ")
    assert "nvfp4" in text
    assert "torch/small/model.py" in text


def test_units() -> None:
    assert [format_bytes(n) for n in (0, 999, 1000, 79.01e9, 2.5e15)] == [
        "0 B",
        "999 B",
        "1.00 kB",
        "79.01 GB",
        "2500.00 TB",
    ]
    assert [format_count(n) for n in (999, 1500, 120.67e9)] == ["999", "1.50K", "120.67B"]
