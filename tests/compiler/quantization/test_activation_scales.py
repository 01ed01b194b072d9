"""Scales of activations in files, and which the checkpoint gets."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from n3c.backends.safetensors.checkpoint import Checkpoint
from n3c.compiler.quantization.calibration.activation_scales import entries_of, load_scales, resolve, save_scales
from n3c.compiler.quantization.calibration.calibrate import Amax
from n3c.compiler.quantization.units import find_linears
from n3c.ir.diagnostics import ExitCode, N3CError
from n3c.specs.dump import dump_spec
from n3c.specs.schema import Quantization, Spec
from support.checkpoints import write_checkpoint
from support.command import n3c
from support.specs import QUANTIZED, small_spec


@pytest.fixture
def spec() -> Spec:
    made = small_spec(QUANTIZED)
    return replace(made, serving=replace(made.serving, kv_cache_dtype="fp8"))


@pytest.fixture
def amax(spec: Spec) -> Amax:
    inputs = {linear.module: 1.0 + i for i, linear in enumerate(find_linears(spec))}
    return Amax(inputs, {f"backbone.layers.3.mixer.{half}_proj": 7.0 for half in "kv"})


@pytest.mark.parametrize("name", ["scales.json", "scales.safetensors"])
def test_what_is_saved_is_loaded(spec: Spec, amax: Amax, tmp_path: Path, name: str) -> None:
    save_scales(tmp_path / name, entries_of(amax))
    loaded = load_scales(tmp_path / name, spec)
    assert loaded == entries_of(amax)
    scales = resolve(spec, loaded)
    f32 = np.float32
    experts = amax.inputs["backbone.layers.1.mixer.experts.*.up_proj"]
    for expert in range(8):  # NVFP4, one value for all
        assert scales.inputs[f"backbone.layers.1.mixer.experts.{expert}.up_proj"] == f32(experts) / f32(2688)
    in_proj = amax.inputs["backbone.layers.0.mixer.in_proj"]
    assert scales.inputs["backbone.layers.0.mixer.in_proj"] == f32(in_proj) / f32(448)  # FP8
    assert "backbone.layers.3.mixer.q_proj" not in scales.inputs  # BF16
    assert "backbone.layers.1.mixer.experts.*.up_proj" not in scales.inputs
    assert scales.cache == {f"backbone.layers.3.mixer.{half}_proj.{half}_scale": 7 / 448 for half in "kv"}


def test_scales_of_a_modelopt_checkpoint_are_taken_as_they_are(spec: Spec, amax: Amax, tmp_path: Path) -> None:
    scales = resolve(spec, entries_of(amax))
    theirs = {f"{module}.input_scale": value for module, value in scales.inputs.items()} | dict(scales.cache)
    save_file({name: np.array(value, np.float32) for name, value in theirs.items()}, tmp_path / "s.safetensors")
    again = resolve(spec, load_scales(tmp_path / "s.safetensors", spec))
    assert again == scales


@pytest.mark.parametrize("value", [10**400, 1e39, -1e-9, math.inf, math.nan, True, "1", None, [1.0]])
def test_what_float32_does_not_hold_is_no_scale(spec: Spec, tmp_path: Path, value: object) -> None:
    path = tmp_path / "scales.json"
    path.write_text(json.dumps({"backbone.layers.0.mixer.in_proj.input_amax": value}), encoding="utf-8")
    with pytest.raises(N3CError) as caught:
        load_scales(path, spec)
    assert (caught.value.exit_code, caught.value.diagnostics[0].code) == (ExitCode.FILE, "E0633")


def test_a_large_tensor_among_the_scales_is_not_read(spec: Spec, tmp_path: Path) -> None:
    path, size = tmp_path / "scales.safetensors", 1 << 40
    header = json.dumps(
        {"backbone.layers.0.mixer.in_proj.input_amax": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    ).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    with pytest.raises(N3CError) as caught:
        load_scales(path, spec)
    assert caught.value.diagnostics[0].code == "E0633"


def test_an_input_that_was_always_zero_gets_one(spec: Spec, amax: Amax) -> None:
    amax.inputs["backbone.layers.0.mixer.in_proj"] = 0.0
    assert resolve(spec, entries_of(amax)).inputs["backbone.layers.0.mixer.in_proj"] == 1.0


def test_without_an_fp8_cache_it_has_no_scales(spec: Spec, amax: Amax) -> None:
    plain = replace(spec, serving=replace(spec.serving, kv_cache_dtype="bf16"))
    assert resolve(plain, entries_of(amax)).cache == {}


def test_missing_scales_are_all_named(spec: Spec, amax: Amax, tmp_path: Path) -> None:
    del amax.inputs["backbone.layers.0.mixer.in_proj"]
    del amax.cache["backbone.layers.3.mixer.k_proj"]
    with pytest.raises(N3CError) as caught:
        resolve(spec, entries_of(amax), tmp_path / "scales.json")
    assert caught.value.exit_code is ExitCode.FILE
    assert [(d.code, d.message, str(d.span)) for d in caught.value.diagnostics] == [
        ("E0634", f"no scale `{name}`", f"{tmp_path / 'scales.json'}:1:1")
        for name in ("backbone.layers.0.mixer.in_proj.input_amax", "backbone.layers.3.mixer.k_proj.output_amax")
    ]


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("no json", "E0632", "not JSON"),
        ("[1]", "E0632", "not a JSON object"),
        (json.dumps({"backbone.layers.9.mixer.in_proj.input_amax": 1}), "E0632", "is no scale of this model"),
        (json.dumps({"backbone.layers.0.mixer.in_proj.weight": 1}), "E0632", "is no scale of this model"),
        (json.dumps({"backbone.layers.0.mixer.in_proj.input_amax": "big"}), "E0633", "is big"),
        (json.dumps({"backbone.layers.0.mixer.in_proj.input_amax": -1}), "E0633", "is -1"),
        (json.dumps({"backbone.layers.0.mixer.in_proj.input_amax": math.nan}), "E0633", "is nan"),
    ],
)
def test_files_that_are_no_scales(spec: Spec, tmp_path: Path, text: str, code: str, words: str) -> None:
    (tmp_path / "s.json").write_text(text, encoding="utf-8")
    with pytest.raises(N3CError, match=words) as caught:
        load_scales(tmp_path / "s.json", spec)
    assert (caught.value.diagnostics[0].code, caught.value.exit_code) == (code, ExitCode.FILE)


def test_safetensors_that_are_no_scales(spec: Spec, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    save_file({"backbone.layers.0.mixer.in_proj.input_scale": np.zeros(3, np.float32)}, tmp_path / "b.safetensors")
    for name, code in (("a", "E0609"), ("b", "E0633")):
        with pytest.raises(N3CError) as caught:
            load_scales(tmp_path / f"{name}.safetensors", spec)
        assert caught.value.diagnostics[0].code == code


def test_hundreds_of_unknown_names_are_counted(spec: Spec, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(json.dumps({f"x{i}.input_amax": 1 for i in range(300)}), encoding="utf-8")
    with pytest.raises(N3CError) as caught:
        load_scales(tmp_path / "s.json", spec)
    (fault,) = caught.value.diagnostics
    words = "300 names are no scales of it: `x0.input_amax`, `x1.input_amax`, `x2.input_amax` and 297 more"
    assert fault.message == words


def test_a_quantized_checkpoint_gives_its_scales(spec: Spec, amax: Amax, tmp_path: Path) -> None:
    """Of every expert, of the cache, and for another format than the checkpoint has."""
    write_checkpoint(tmp_path / "source", replace(spec, quantization=None), shards=2)
    (tmp_path / "spec.toml").write_text(dump_spec(spec), encoding="utf-8")
    save_scales(tmp_path / "scales.json", entries_of(amax))
    start = ("quantize", tmp_path / "spec.toml", "--weights", tmp_path / "source")
    made = n3c(*start, "-o", tmp_path / "made", "--activation-scales", tmp_path / "scales.json")
    assert made.code == 0, made.err
    again = n3c(*start, "-o", tmp_path / "again", "--activation-scales", tmp_path / "made")
    assert again.code == 0, again.err
    assert "backbone.layers.3.mixer.k_proj.k_scale" in Checkpoint(tmp_path / "made")
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("made", "again"))
    assert one == other

    fp8 = replace(spec, quantization=Quantization("fp8", (1, 16), spec.quantization.rules if spec.quantization else ()))
    entries = load_scales(tmp_path / "made", fp8)
    expert = "backbone.layers.1.mixer.experts.3.up_proj"
    assert entries[f"{expert}.input_amax"] == pytest.approx(amax.inputs[expert.replace(".3.", ".*.")])
    assert resolve(fp8, entries).inputs[expert] == pytest.approx(amax.inputs[expert.replace(".3.", ".*.")] / 448)


def test_an_unquantized_checkpoint_gives_none(spec: Spec, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", spec)
    with pytest.raises(N3CError, match="holds no input_scale") as caught:
        load_scales(tmp_path / "source", spec)
    assert (caught.value.diagnostics[0].code, caught.value.exit_code) == ("E0632", ExitCode.FILE)
