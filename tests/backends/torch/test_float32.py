"""What stays float32 in every cast; float64; copies, averages and torch.func."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.func import functional_call, grad
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .generated import generate, tiny_spec

IDS = torch.randint(97, (2, 19), generator=torch.Generator().manual_seed(5))
KEPT = ("dt_bias", "A_log", "D", "e_score_correction_bias")


@pytest.fixture(scope="module")
def package() -> Any:
    return generate(tiny_spec("MEM*E-"))


@pytest.fixture
def model(package: Any) -> Any:
    torch.manual_seed(0)
    return package.Model()


def kept(model: Any) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items() if n.rsplit(".", 1)[-1] in KEPT}


def tensors() -> int:
    """Return how many tensors there are."""
    gc.collect()
    return sum(issubclass(type(held), Tensor) for held in gc.get_objects())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_leaves_them_as_they_are(package: Any, model: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    """Their values, their gradients and the tensors of an export."""
    before = kept(model)
    model(IDS, IDS).loss.backward()
    model.to(dtype)
    assert model.backbone.layers[0].mixer.in_proj.weight.dtype == dtype
    after = kept(model)
    assert len(after) == 9 and all(torch.equal(after[name], tensor) for name, tensor in before.items())
    mixer = model.backbone.layers[0].mixer
    assert mixer.A_log.grad.dtype == torch.float32 and mixer.in_proj.weight.grad.dtype == dtype
    package.save_checkpoint(model, tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in before.items())
    again = package.Model().to(dtype)
    package.load_checkpoint(again, tmp_path / "saved")
    assert all(torch.equal(tensor, before[name]) for name, tensor in kept(again).items())


def test_steps_too_small_for_bfloat16_count(model: Any) -> None:
    model.bfloat16()
    A_log = model.backbone.layers[0].mixer.A_log
    before = A_log.detach().clone()
    optimizer = torch.optim.SGD([A_log], lr=1e-4)
    for _ in range(5):
        A_log.grad = torch.ones_like(A_log)
        optimizer.step()
    torch.testing.assert_close(A_log.detach(), before - 5e-4, atol=1e-6, rtol=0)


def test_float64(model: Any) -> None:
    """All of it is computed in float64: cached steps agree to its rounding, gradients with differences."""
    expected = copy.deepcopy(model)(IDS, IDS)
    model.double()
    assert {t.dtype for t in model.state_dict().values()} == {torch.float64}
    out = model(IDS, IDS, return_logits=False)
    assert out.loss.dtype == torch.float64
    torch.testing.assert_close(out.loss.float(), expected.loss, atol=1e-5, rtol=0)
    state = model.allocate_state(2, 32)
    steps = torch.cat([model.step(ids, state) for ids in IDS.split(1, dim=1)], 1)
    assert (model(IDS).logits - steps).abs().max() < 1e-12

    weight = model.backbone.layers[0].mixer.A_log
    out.loss.backward()
    with torch.no_grad():
        losses = []
        for step in (1e-4, -1e-4):
            weight[3] += step
            losses.append(float(model(IDS, IDS).loss))
            weight[3] -= step
    assert float(weight.grad[3]) == pytest.approx((losses[0] - losses[1]) / 2e-4, rel=1e-4)


def test_copies_and_averages(model: Any) -> None:
    """Between forward and backward passes, and after them; what routers counted is held by nobody."""
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    for _ in range(2):
        out = model(IDS, IDS)
        twin = copy.deepcopy(model)
        out.loss.backward()
        average.update_parameters(model)
        assert torch.equal(twin.eval()(IDS).logits, copy.deepcopy(model).eval()(IDS).logits)
    assert torch.isfinite(average(IDS).logits).all()
    before = tensors()
    for _ in range(3):
        model(IDS, IDS)
    assert tensors() <= before


def test_torch_func(model: Any) -> None:
    """functional_call has the gradients of the model; transforms are refused by PyTorch, with a reason."""
    parameters = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    loss = functional_call(model, parameters, (IDS, IDS)).loss
    loss.backward()
    model(IDS, IDS).loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, parameters[name].grad), name

    def loss_of(given: dict[str, Tensor]) -> Tensor:
        loss: Tensor = functional_call(model, given, (IDS, IDS)).loss
        return loss

    with pytest.raises(RuntimeError, match="must override the setup_context staticmethod"):
        grad(loss_of)(parameters)
