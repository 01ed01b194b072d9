"""Calibration and scores part by part, against the whole model at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from n3c.backends.progress import SILENT
from n3c.backends.safetensors.checkpoint import Checkpoint
from n3c.compiler.quantization.calibration import streamed_model
from n3c.compiler.quantization.calibration.calibrate import Amax, calibrate, recorded
from n3c.compiler.quantization.calibration.streamed_model import StreamedModel
from n3c.compiler.quantization.search import fake_quant
from n3c.compiler.quantization.search.sensitivity import measure
from n3c.ir.diagnostics import ExitCode, N3CError
from n3c.passes.lower.model import lower
from n3c.specs.schema import Spec
from support.programs import random_tensors, save_tensors
from support.specs import small_spec


@pytest.fixture(scope="module")
def spec() -> Spec:
    return small_spec()


@pytest.fixture(scope="module")
def checkpoint(spec: Spec, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return save_tensors(random_tensors(lower(spec)), tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 97, (6, 24), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def model(spec: Spec, checkpoint: Checkpoint) -> StreamedModel:
    return StreamedModel(spec, checkpoint)


def whole_model(model: StreamedModel) -> Any:
    whole = model.generated.Model()
    model.generated.load_checkpoint(whole, model.checkpoint.directory)
    return whole


@pytest.mark.parametrize("batch", [24, 4096])
def test_magnitudes_are_those_of_the_whole_model(
    model: StreamedModel, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    monkeypatch.setattr(streamed_model, "BATCH_TOKENS", batch)
    amax = calibrate(model, ids, SILENT, mtp=True)
    whole, expected = whole_model(model), Amax()
    with torch.no_grad(), recorded(model, "", whole, expected):
        whole(ids)
    assert amax.inputs == pytest.approx({name[1:]: value for name, value in expected.inputs.items()}, rel=1e-6)
    assert amax.cache == pytest.approx({name[1:]: value for name, value in expected.cache.items()}, rel=1e-6)
    assert "backbone.layers.1.mixer.experts.*.down_proj" in amax.inputs
    assert "mtp.layers.1.mixer.experts.*.down_proj" in amax.inputs


def test_one_block_is_in_memory_at_a_time(model: StreamedModel, ids: torch.Tensor) -> None:
    loaded: set[str] = set()

    def keep(name: str, x: torch.Tensor) -> None:
        del name, x
        loaded.update(n for n, p in model.model.named_parameters() if not p.is_meta)

    class Watching:
        def phase(self, name: str) -> None: ...

        def step(self, what: str, done: int = 0, total: int = 0) -> None:
            loaded.update(n for n, p in model.model.named_parameters() if not p.is_meta)

        def item(self, what: str, done: int, total: int) -> None: ...

    calibrate(model, ids, Watching(), mtp=True, keep=keep)
    assert not loaded
    with model.loaded("backbone.layers.1"):
        inside = {n for n, p in model.model.named_parameters() if not p.is_meta}
        assert {".".join(n.split(".")[:3]) for n in inside} == {"backbone.layers.1"}


def test_scores_are_those_of_the_whole_model(
    spec: Spec, checkpoint: Checkpoint, model: StreamedModel, ids: torch.Tensor
) -> None:
    """One linear, the experts of a layer, and one linear of the MTP block, which runs twice, by their definition."""
    sensitivity = measure(spec, checkpoint, SILENT, ids=ids, mtp=True)
    assert sensitivity.amax is not None
    whole = whole_model(model)
    tokens = ids.numel()

    seen: list[tuple[Any, tuple[Any, ...], Any]] = []
    watched = {
        "backbone.layers.0.mixer.out_proj": whole.backbone.layers[0].mixer.out_proj,
        "backbone.layers.1.mixer.experts": whole.backbone.layers[1].mixer.experts,
        "mtp.layers.0.eh_proj": whole.mtp.layers[0].eh_proj,
    }

    def see(module: Any, arguments: tuple[Any, ...], y: Any) -> None:
        y.retain_grad()
        seen.append((module, arguments, y))

    for module in watched.values():
        module.register_forward_hook(see)
    out = whole(ids, labels=ids)
    # the calibration's loss is a sum over tokens; the model's a mean over each step's own
    predicted = [ids[:, k + 1 :].numel() for k in range(3)]
    cross = torch.nn.functional.cross_entropy
    loss = cross(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) * predicted[0]
    assert spec.mtp is not None
    for k, ahead in enumerate(out.mtp_logits, start=1):
        one = cross(ahead[:, :-1].flatten(0, 1), ids[:, k + 1 :].flatten()) * predicted[k]
        loss = loss + spec.mtp.loss_scaling_factor / spec.mtp.depth * one
    loss.backward()

    amax = sensitivity.amax.inputs
    for name, module in watched.items():
        calls = [(x, y) for m, x, y in seen if m is module]
        assert len(calls) == (2 if name.startswith("mtp.") else 1)
        total = 0.0
        for x, y in calls:
            with torch.no_grad():
                if name.endswith(".experts"):
                    quantized = _experts(module, x, amax[f"{name}.*.up_proj"], amax[f"{name}.*.down_proj"])
                else:
                    w = fake_quant.weight(module.weight, "nvfp4", 1)
                    quantized = fake_quant.activation(x[0], "nvfp4", amax[name]) @ w.T
                total += float((y.grad * (quantized - y)).double().square().sum())
        assert sensitivity.scores[name]["nvfp4"] == pytest.approx(total / tokens, rel=1e-4)
        assert sensitivity.scores[name]["bf16"] == 0


def _experts(module: Any, arguments: tuple[Any, ...], up_amax: float, down_amax: float) -> torch.Tensor:
    """Return what NVFP4 experts give, token by token."""
    shape = arguments[0].shape
    x, experts, weights = (argument.flatten(0, 1) for argument in arguments)
    up, down = (fake_quant.weight(w.detach(), "nvfp4", 1) for w in (module.up_proj, module.down_proj))
    x = fake_quant.activation(x, "nvfp4", up_amax)
    rows: list[torch.Tensor] = []
    for token, chosen, factors in zip(x, experts, weights, strict=True):
        total = torch.zeros(down.shape[1])
        for expert, factor in zip(chosen.tolist(), factors, strict=True):
            inner = torch.relu(up[expert] @ token).square()
            total = total + factor * (down[expert] @ fake_quant.activation(inner[None], "nvfp4", down_amax)[0])
        rows.append(total)
    return torch.stack(rows).view(shape)


@pytest.mark.parametrize(
    ("change", "code", "exit_code"),
    [
        ("infinite", "E0409", ExitCode.NUMERICS),
        ("missing", "E0603", ExitCode.FILE),
        ("shape", "E0606", ExitCode.FILE),
        ("quantized", "E0605", ExitCode.FILE),
    ],
)
def test_checkpoints_that_cannot_be_calibrated(
    spec: Spec, ids: torch.Tensor, tmp_path: Path, change: str, code: str, exit_code: ExitCode
) -> None:
    tensors = random_tensors(lower(spec))
    name = "backbone.layers.1.mixer.experts.3.up_proj.weight"
    if change == "infinite":
        for expert in range(8):  # whichever the router takes
            tensors[name.replace("3", str(expert))] = torch.full_like(tensors[name], torch.inf)
    elif change == "missing":
        del tensors[name]
    else:
        tensors[name] = tensors[name][1:] if change == "shape" else tensors[name].to(torch.float8_e4m3fn)
    with pytest.raises(N3CError, match=r"layers\.1\.mixer\.experts") as caught:
        calibrate(StreamedModel(spec, save_tensors(tensors, tmp_path)), ids, SILENT, mtp=False)
    assert (caught.value.diagnostics[0].code, caught.value.exit_code) == (code, exit_code)


def test_it_is_deterministic(spec: Spec, checkpoint: Checkpoint, ids: torch.Tensor) -> None:
    first, second = (measure(spec, checkpoint, SILENT, ids=ids).within(6.0) for _ in range(2))
    assert (first.formats, first.scores, first.spec) == (second.formats, second.scores, second.spec)
    assert np.isclose(first.bits, 6.0, atol=0.2)
