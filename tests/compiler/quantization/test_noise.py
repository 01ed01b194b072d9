"""Sensitivity from weights alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from n3c.backends.progress import SILENT
from n3c.backends.safetensors import nvfp4
from n3c.compiler.quantization.search.noise import noise_scores
from n3c.compiler.quantization.units import find_units
from n3c.ir.diagnostics import ExitCode, N3CError
from n3c.passes.lower.model import lower
from support.programs import random_tensors, save_tensors
from support.specs import small_spec


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return random_tensors(lower(small_spec()))


def test_it_is_noise_over_signal_behind_the_norm(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    units = find_units(small_spec(), "nvfp4", 1, mtp=False)
    scores = noise_scores(units, save_tensors(tensors, tmp_path), 1, SILENT)
    w = tensors["backbone.layers.0.mixer.in_proj.weight"].float().numpy()
    gain = tensors["backbone.layers.0.norm.weight"].float().numpy().astype(np.float64) ** 2
    error = (nvfp4.dequantize(nvfp4.quantize(w, 1)) - w).astype(np.float64)
    expected = (error**2 @ gain).sum() / (w.astype(np.float64) ** 2 @ gain).sum()
    assert scores["backbone.layers.0.mixer.in_proj"]["nvfp4"] == pytest.approx(expected, rel=1e-6)
    for unit in units:
        harm = [scores[unit.name][format_] for format_ in unit.formats]
        assert harm == sorted(harm, reverse=True)
        assert harm[-1] == 0.0  # the checkpoint is BF16


def test_experts_of_a_layer_are_one_signal(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    loud = dict(tensors)
    name = "backbone.layers.1.mixer.experts.2.up_proj.weight"
    loud[name] = loud[name] * 1e4
    units = [u for u in find_units(small_spec(), "nvfp4", 1, mtp=False) if u.name == "backbone.layers.1.mixer.experts"]
    score = noise_scores(units, save_tensors(loud, tmp_path), 1, SILENT)[units[0].name]["nvfp4"]
    w = loud[name].float().numpy()
    alone = float(((nvfp4.dequantize(nvfp4.quantize(w, 1)) - w) ** 2).sum() / (w**2).sum())
    downs = [loud[n].float().numpy() for n in units[0].linears[1].tensors]
    noise = sum(float(((nvfp4.dequantize(nvfp4.quantize(d, 1)) - d) ** 2).sum()) for d in downs)
    assert score == pytest.approx(alone + noise / sum(float((d**2).sum()) for d in downs), rel=1e-3)


@pytest.mark.parametrize(
    ("change", "code"),
    [("nan", "E0607"), ("missing", "E0603"), ("shape", "E0606"), ("quantized", "E0605")],
)
def test_weights_that_cannot_be_measured(
    tensors: dict[str, torch.Tensor], tmp_path: Path, change: str, code: str
) -> None:
    name = "backbone.layers.0.mixer.out_proj.weight"
    broken = dict(tensors)
    if change == "nan":
        broken[name] = broken[name].clone()
        broken[name][3, 4] = torch.nan
    elif change == "missing":
        del broken[name]
    else:
        broken[name] = broken[name][:, 1:] if change == "shape" else broken[name].to(torch.float8_e4m3fn)
    checkpoint = save_tensors(broken, tmp_path)
    with pytest.raises(N3CError, match=r"backbone\.layers\.0\.mixer\.out_proj\.weight") as caught:
        noise_scores(find_units(small_spec(), "nvfp4", 1, mtp=False), checkpoint, 1, SILENT)
    assert (caught.value.diagnostics[0].code, caught.value.exit_code) == (code, ExitCode.FILE)
