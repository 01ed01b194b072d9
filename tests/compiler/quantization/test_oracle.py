"""Calibration and sensitivity against ModelOpt's own, on transformers' model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from n3c.backends.progress import SILENT
from n3c.backends.safetensors.checkpoint import Checkpoint
from n3c.compiler.quantization.calibration.activation_scales import entries_of, resolve
from n3c.compiler.quantization.calibration.calibrate import Amax, calibrate
from n3c.compiler.quantization.calibration.streamed_model import StreamedModel
from n3c.compiler.quantization.search.sensitivity import measure
from n3c.specs.rules_table import spec_with_table
from support.oracles import SavedModel, modelopt_scales, modelopt_scores, saved_model

TOLERANCE = 1e-6
"""Float32 sums in another order; the scales themselves have 24 bits."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> SavedModel:
    return saved_model(tmp_path_factory.mktemp("oracle"))


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(0, 97, (4, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def amax(saved: SavedModel, ids: Tensor) -> Amax:
    return calibrate(StreamedModel(saved.spec, Checkpoint(saved.folder)), ids, SILENT, mtp=False)


@pytest.mark.parametrize(("format_", "config"), [("nvfp4", "NVFP4_DEFAULT_CFG"), ("fp8", "FP8_DEFAULT_CFG")])
def test_the_scales_are_those_of_modelopt(
    saved: SavedModel, ids: Tensor, amax: Amax, tmp_path: Path, format_: str, config: str
) -> None:
    theirs = modelopt_scales(saved.model, ids, tmp_path / "exported", config)
    rules = [{"roles": ["moe.router", "mamba.conv1d", "embedding", "lm_head"], "format": "bf16"}]
    spec = spec_with_table(saved.spec, {"format": format_, "block": [1, 16], "rules": rules})
    spec = replace(spec, serving=replace(spec.serving, kv_cache_dtype="fp8"))
    ours = resolve(spec, entries_of(amax))
    inputs = {f"{module}.input_scale": value for module, value in ours.inputs.items()}
    assert inputs | dict(ours.cache) == pytest.approx(theirs, rel=TOLERANCE)
    assert len(theirs) > 50


def test_the_scores_are_those_of_autoquantize(saved: SavedModel, ids: Tensor) -> None:
    theirs = {
        name.replace("model.", "backbone.").replace(".q_proj", ".qkv"): score
        for name, score in modelopt_scores(saved.model, ids).items()
        if not name.endswith(".conv1d")
    }
    sensitivity = measure(saved.spec, Checkpoint(saved.folder), SILENT, ids=ids)
    ours = {name: scores["fp8"] * ids.numel() for name, scores in sensitivity.scores.items()}
    assert ours == pytest.approx(theirs, rel=5e-5)  # float32 sums in another order
