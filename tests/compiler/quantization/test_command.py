"""`n3c quantize` with formats that are chosen or taken from elsewhere, and with activation scales."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from n3c.compiler.quantization.search.budget import mean_bits
from n3c.compiler.quantization.units import find_units
from n3c.passes.lower.model import lower
from n3c.specs.huggingface import export_config
from n3c.specs.load import load_spec
from support.command import Result, n3c, tree, write_small
from support.programs import random_tensors, save_tensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the small spec, its checkpoint in `weights`, and tokens."""
    folder = tmp_path_factory.mktemp("quantize")
    spec, _ = load_spec(write_small(folder))
    save_tensors(random_tensors(lower(spec)), folder / "weights")
    (folder / "weights/config.json").write_text(json.dumps(export_config(spec)), encoding="utf-8")
    np.save(folder / "ids.npy", np.random.default_rng(0).integers(0, 97, 400))
    return folder


def quantize(folder: Path, out: Path, *options: object) -> Result:
    return n3c("quantize", folder / "small.toml", "--weights", folder / "weights", "-o", out, "--json", *options)


def ledger(out: Path) -> list[dict[str, Any]]:
    (file,) = out.glob("n3c_ledger.json")
    weights: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["weights"]
    return weights


def test_auto_writes_a_spec_that_gives_the_same_checkpoint(folder: Path, tmp_path: Path) -> None:
    calibration = ("--calibration", folder / "ids.npy", "--calibration-length", 20)
    saved = ("--save-activation-scales", tmp_path / "scales.json", "--write-spec", tmp_path / "chosen.toml")
    auto = ("--auto", "--effective-bits", 6, "--block", "1x16", *calibration, *saved)
    result = quantize(folder, tmp_path / "out", *auto)
    assert result.code == 0, result.err
    chosen = result.data["auto"]
    assert chosen["method"] == "second order"
    assert 5.5 < chosen["effective_bits"] <= 6

    spec, _ = load_spec(tmp_path / "chosen.toml")
    text = (tmp_path / "chosen.toml").read_text(encoding="utf-8")
    assert text.startswith("# Formats chosen by n3c quantize --auto from second order: 5.9")
    formats = {unit["name"]: unit["format"] for unit in chosen["units"]}
    assert mean_bits(find_units(spec, "nvfp4", 1, mtp=False), formats) == pytest.approx(chosen["effective_bits"])
    lines = ledger(tmp_path / "out")
    assert all(line["rule"].startswith("quantization.") or line["rule"] == "not a linear" for line in lines)
    assert {"nvfp4", "fp8"} <= {line["format"] for line in lines}
    assert {line["format"] for line in lines if line["role"] in ("moe.router", "embedding")} == {"bf16", "f32"}

    again = n3c(
        "quantize", tmp_path / "chosen.toml", "--weights", folder / "weights", "-o", tmp_path / "again",
        "--activation-scales", tmp_path / "scales.json",
    )  # fmt: skip
    assert again.code == 0, again.err
    one, other = tree(tmp_path / "again"), tree(tmp_path / "out")
    assert {name for name in one if one[name] != other[name]} == {"README.md", "n3c_record.json"}  # other commands

    like = quantize(
        folder, tmp_path / "like", "--like", tmp_path / "out", "--activation-scales", tmp_path / "scales.json"
    )
    assert like.code == 0, like.err
    assert _tensors(tmp_path / "like") == _tensors(tmp_path / "out")


def _tensors(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


def test_auto_from_weights_alone_has_no_activation_scales(folder: Path, tmp_path: Path) -> None:
    result = quantize(folder, tmp_path / "out", "--auto")
    assert result.code == 0, result.err
    assert result.data["auto"]["method"] == "weight noise"
    assert result.data["auto"]["effective_bits"] <= 4.8
    assert result.data["activation_scales"] == {"inputs": 0, "cache": 0}
    with safe_open(tmp_path / "out/model.safetensors", framework="numpy") as file:
        scales = [name for name in file.keys() if name.endswith("input_scale")]  # noqa: SIM118
        for name in scales:  # no reader has FP8 without: the neutral one
            assert file.get_slice(name.replace("input_scale", "weight")).get_dtype() == "F8_E4M3"
            assert file.get_tensor(name) == 1
    assert len(scales) == result.data["formats"].get("fp8", {"weights": 0})["weights"]


def test_calibration_gives_input_and_cache_scales(folder: Path, tmp_path: Path) -> None:
    options = ("--fmt", "nvfp4", "--block", "1x16", "--set", "serving.kv_cache_dtype=fp8")
    sensitive = '["lm_head", "mtp.*", "moe.router", "embedding"]'
    rules = f'[quantization]\nformat = "nvfp4"\n[[quantization.rules]]\nroles = {sensitive}\nformat = "bf16"\n'
    spec = write_small(tmp_path, extra=rules)
    result = n3c(
        "quantize", spec, "--weights", folder / "weights", "-o", tmp_path / "out", "--json", *options,
        "--calibration", folder / "ids.npy", "--calibration-length", 20, "--calibration-samples", 4,
    )  # fmt: skip
    assert result.code == 0, result.err
    with safe_open(tmp_path / "out/model.safetensors", framework="numpy") as file:
        names = set(file.keys())
        one, other = (
            file.get_tensor(f"backbone.layers.1.mixer.experts.{expert}.up_proj.input_scale") for expert in (0, 7)
        )
    assert one == other > 0
    assert {f"backbone.layers.3.mixer.{half}_proj.{half}_scale" for half in "kv"} <= names
    assert not [name for name in names if name.startswith("mtp.") and name.endswith("_scale")]


@pytest.mark.parametrize(
    ("options", "code", "diagnostic"),
    [
        (("--like", "x", "--auto"), 2, "E0701"),
        (("--effective-bits", 5), 2, "E0701"),
        (("--auto", "--effective-bits", 17), 2, "E0701"),
        (("--auto", "--effective-bits", "nan"), 2, "E0701"),
        (("--auto", "--effective-bits", 4.4), 2, "E0408"),
        (("--auto-mtp",), 2, "E0701"),
        (("--save-activation-scales", "s.json"), 2, "E0701"),
        (("--calibration", "a.npy", "--activation-scales", "s.json"), 2, "E0701"),
        (("--calibration", "missing.npy"), 6, "E0601"),
        (("--calibration", "text.txt"), 2, "E0703"),
        (("--calibration", "beyond.npy"), 6, "E0630"),
        (("--calibration", "a.npy", "--data-format", "csv"), 2, "E0701"),
        (("--calibration", "empty.npy"), 6, "E0630"),
        (("--calibration", "short.npy"), 6, "E0630"),
        (("--activation-scales", "unknown.json"), 6, "E0632"),
        (("--activation-scales", "none.json"), 6, "E0634"),
        (("--activation-scales", "missing.json"), 6, "E0601"),
        (("--like", "missing"), 6, "E0601"),
    ],
)
def test_bad_input(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[object, ...],
    code: int,
    diagnostic: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("beyond.npy", np.arange(200))
    np.save("short.npy", np.arange(2))  # 8 experts, 3 a token: 3 tokens fill each once
    Path("empty.npy").write_bytes(b"")
    Path("text.txt").write_text("words", encoding="utf-8")
    Path("unknown.json").write_text('{"a.b.input_amax": 1}', encoding="utf-8")
    Path("none.json").write_text("{}", encoding="utf-8")
    result = quantize(folder, tmp_path / "out", "--block", "1x16", *options)
    assert (result.code, set(result.codes)) == (code, {diagnostic}), result.err
    assert not (tmp_path / "out").exists()
