"""The emulation of [training]: the quantizers against plain loops, the linears by their equations, the rules."""

from __future__ import annotations

import importlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ml_dtypes import float4_e2m1fn, float8_e4m3fn
from torch import Tensor

from n3c.backends.torch.context import package_name
from n3c.backends.torch.emit import emit
from n3c.backends.torch.numerics import training_formats
from n3c.specs.load import load_spec
from n3c.specs.schema import Rule, Spec, Training
from support.specs import SPECS

from .generated import SHA256, imported, tiny_spec, write_generated


def spec_with_rules() -> Spec:
    """Return a spec with NVFP4, MXFP8 and BF16 linears; every NVFP4 matrix divides into 16 x 16."""
    spec = tiny_spec("MEM*E", mtp="*E")
    rules = (
        Rule("bf16", roles=("attention.*", "moe.latent_*", "mamba.in_proj", "mtp.*", "lm_head")),
        Rule("mxfp8", roles=("mamba.out_proj",)),
        Rule("bf16", roles=("*",), layers="last 1"),
    )
    return replace(spec, model=replace(spec.model, vocab_size=256), training=Training("nvfp4", rules=rules))


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any, Any]]:
    """Return the generated model, numerics and train."""
    folder = tmp_path_factory.mktemp("numerics")
    write_generated(spec_with_rules(), folder)
    with imported(folder) as found:
        yield found.model, found.numerics, found.train


@pytest.fixture
def numerics(modules: tuple[Any, Any, Any]) -> Any:
    return modules[1]


def by_loops(x: Tensor, rows: int) -> Tensor:
    """NVFP4 block by block, in NumPy scalars; rounding by ml_dtypes."""
    array = x.numpy()
    out = np.zeros_like(array)
    one = np.float32(1)
    scale = np.float32(2688) / np.abs(array).max()
    for top, left in itertools.product(range(0, len(array), rows), range(0, array.shape[1], 16)):
        block = array[top : top + rows, left : left + 16]
        of_block = (np.abs(block).max() * (scale * (one / np.float32(6)))).astype(float8_e4m3fn).astype(np.float32)
        decode = of_block * (one / scale)
        if decode == 0:
            continue
        codes = np.clip(block * (one / decode), -6, 6).astype(float4_e2m1fn)
        out[top : top + rows, left : left + 16] = codes.astype(np.float32) * decode
    return torch.from_numpy(out)


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("largest", [1e-6, 1.0, 1e4])
def test_values_by_loops(numerics: Any, rows: int, largest: float) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(64, 96, generator=generator) * torch.logspace(-3, 1, 64)[:, None]
    x = x / x.abs().max() * largest
    x[16:32, 16:32] = 0
    assert torch.equal(numerics.nvfp4(x, rows), by_loops(x, rows))
    of_one = x / x.abs().max()
    assert torch.equal(numerics.nvfp4(of_one, rows), by_loops(of_one, rows))
    assert not numerics.nvfp4(torch.zeros(16, 16), rows).any()


def test_every_tie_goes_to_the_even_code(numerics: Any) -> None:
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 5.01, 9.0, 0.24, 2.51])
    expected = torch.tensor([0.0, 1, 1, 2, 2, 4, 4, 6, 6, 0, 3])
    assert torch.equal(numerics.round_e2m1(x), expected)
    assert torch.equal(numerics.round_e2m1(-x), -expected)


def test_a_weight_and_its_transpose_have_the_same_values(numerics: Any) -> None:
    weight = torch.randn(48, 80)
    assert torch.equal(numerics.nvfp4(weight, 16).T, numerics.nvfp4(weight.T.contiguous(), 16))
    assert not torch.equal(numerics.nvfp4(weight).T, numerics.nvfp4(weight.T.contiguous()))


def test_stochastic_rounding_is_unbiased(numerics: Any) -> None:
    """The mean of 20,000 draws lies within 5 standard errors; no draw leaves the two neighbours."""
    torch.manual_seed(0)
    x = torch.linspace(-5.9, 5.9, 61)
    draws = torch.stack([numerics.round_e2m1(x, stochastic=True) for _ in range(20_000)])
    error = (draws.mean(0) - x).abs()
    assert bool((error <= 5 * draws.std(0) / 20_000**0.5 + 1e-6).all())
    assert all(len(column.unique()) <= 2 for column in draws.T)
    assert set(draws.unique().tolist()) <= {s * v for s in (-1, 1) for v in (0, 0.5, 1, 1.5, 2, 3, 4, 6)}


def test_hadamard_is_orthogonal_and_spreads(numerics: Any) -> None:
    x, y = torch.randn(5, 48), torch.randn(7, 48)
    torch.testing.assert_close(numerics.hadamard(x) @ numerics.hadamard(y).T, x @ y.T, atol=1e-5, rtol=1e-5)
    spread = numerics.hadamard(torch.eye(16)[3:4])
    torch.testing.assert_close(spread.abs(), torch.full((1, 16), 0.25))
    negative = numerics.hadamard(torch.eye(16))[:, 0] < 0  # by the signs alone: the transform's first column is ones
    assert sum(1 << place for place in range(16) if negative[place]) == 0xD7E8  # Transformer Engine's mask


def test_mxfp8(numerics: Any) -> None:
    """A power of two for each 32, so that the largest fits; the rest rounds to e4m3."""
    x = torch.randn(6, 70) * torch.logspace(-4, 4, 6)[:, None]
    got = numerics.mxfp8(x)
    for row, start in itertools.product(range(6), range(0, 70, 32)):
        block = x[row, start : start + 32].numpy()
        scale = np.float32(2) ** np.ceil(np.log2(np.abs(block).max() / np.float32(448)))
        expected = (block / scale).astype(float8_e4m3fn).astype(np.float32) * scale
        assert np.array_equal(got[row, start : start + 32].numpy(), expected)


def test_linear_by_its_equations(numerics: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, dx and dW; the draws of stochastic rounding are all 1/2 here, so both sides share them."""

    def half(x: Tensor) -> Tensor:
        return torch.full_like(x, 0.5)

    monkeypatch.setattr(torch, "rand_like", half)
    x, weight = torch.randn(3, 7, 32, requires_grad=True), torch.randn(48, 32, requires_grad=True)
    y = numerics.linear(x, weight, "nvfp4")
    dy = torch.randn(3, 7, 48)
    y.backward(dy)
    flat, down = x.detach().view(21, 32), dy.view(21, 48)
    values = by_loops(weight.detach(), 16)
    torch.testing.assert_close(y.detach().view(21, 48), by_loops(flat, 1) @ values.T)
    assert x.grad is not None and weight.grad is not None
    torch.testing.assert_close(x.grad.view(21, 32), numerics.nvfp4(down, 1, True) @ values)
    padded = [torch.cat([t, torch.zeros(11, t.shape[1])]).T.contiguous() for t in (down, flat)]
    left, right = (numerics.hadamard(t) for t in padded)
    torch.testing.assert_close(weight.grad, numerics.nvfp4(left, 1, True) @ by_loops(right, 1).T)
    exact = down.T @ flat
    assert 0.01 < ((weight.grad - exact).norm() / exact.norm()).item() < 0.3


def test_linear_without_its_ingredients(numerics: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One-dimensional blocks for W and for its transpose, no transform, rounding to nearest: all by plain loops."""
    for name in ("DISABLE_2D_QUANTIZATION", "DISABLE_RHT", "DISABLE_STOCHASTIC_ROUNDING"):
        assert getattr(numerics, name) is False  # what the spec says
        monkeypatch.setattr(numerics, name, True)
    x, weight = torch.randn(32, 48, requires_grad=True), torch.randn(64, 48, requires_grad=True)
    dy = torch.randn(32, 64)
    y = numerics.linear(x, weight, "nvfp4")
    y.backward(dy)
    values, turned = (by_loops(t.detach().contiguous(), 1) for t in (weight, weight.T))
    torch.testing.assert_close(y.detach(), by_loops(x.detach(), 1) @ values.T)
    torch.testing.assert_close(x.grad, by_loops(dy, 1) @ turned.T)
    operands = [by_loops(t.T.contiguous(), 1) for t in (dy, x.detach())]
    torch.testing.assert_close(weight.grad, operands[0] @ operands[1].T)


def test_block_of_the_spec() -> None:
    one = replace(spec_with_rules(), training=Training("nvfp4", (1, 16)))
    for spec, said in ((spec_with_rules(), "False"), (one, "True")):
        assert f"DISABLE_2D_QUANTIZATION = {said}" in emit(spec, SHA256)[f"{package_name(spec)}/numerics.py"]


def test_rules(modules: tuple[Any, Any, Any]) -> None:
    """The last matching rule decides; the router, the convolution and the embedding never take part."""
    formats = dict(training_formats(spec_with_rules()))
    moe = "backbone.layers.1.mixer"
    assert formats == {
        "backbone.layers.0.mixer.out_proj": "mxfp8",
        "backbone.layers.2.mixer.out_proj": "mxfp8",
        f"{moe}.experts.up_proj": "nvfp4",
        f"{moe}.experts.down_proj": "nvfp4",
        f"{moe}.shared_experts.up_proj": "nvfp4",
        f"{moe}.shared_experts.down_proj": "nvfp4",
    }
    model = modules[0].Model()
    modules[1].emulate(model)
    changed = {n for n, m in model.named_modules() if type(m).__name__.startswith("Emulated")}
    assert changed == {name.replace(".mixer.experts.up_proj", ".mixer.experts") for name in formats} - {
        f"{moe}.experts.down_proj"
    }


def test_rules_of_super() -> None:
    """The last 14 layers, attention, latent projections and MTP are BF16; Mamba's out_proj is MXFP8."""
    spec = load_spec(SPECS / "super.toml")[0]
    formats = dict(training_formats(spec))
    pattern = spec.model.pattern.symbols
    assert {int(name.split(".")[2]) for name in formats} == {i for i, s in enumerate(pattern[:74]) if s in "ME"}
    kinds = {(name.partition(".mixer.")[2], kind) for name, kind in formats.items()}
    assert kinds == {
        ("in_proj", "nvfp4"),
        ("out_proj", "mxfp8"),
        *((f"{part}.{half}_proj", "nvfp4") for part in ("experts", "shared_experts") for half in ("up", "down")),
    }


def test_experts_by_a_loop(modules: tuple[Any, Any, Any]) -> None:
    model, numerics, _ = modules
    torch.manual_seed(1)
    net = model.Model()
    numerics.emulate(net)
    experts = net.backbone.layers[1].mixer.experts
    x, chosen, weights = torch.randn(9, 32), torch.randint(8, (9, 2)), torch.rand(9, 2)
    got = experts(x, chosen, weights)
    expected = torch.zeros(9, 32)
    for e in range(8):
        rows, slots = (chosen == e).nonzero(as_tuple=True)
        if len(rows):
            inner = by_loops(x[rows], 1) @ by_loops(experts.up_proj[e].detach(), 16).T
            y = by_loops(inner.relu().square(), 1) @ by_loops(experts.down_proj[e].detach(), 16).T
            expected.index_add_(0, rows, y * weights[rows, slots, None])
    torch.testing.assert_close(got.detach(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kinds", [*itertools.product(("nvfp4", "mxfp8", "bf16"), repeat=2)])
def test_experts_are_linears_of_their_own(
    modules: tuple[Any, Any, Any], monkeypatch: pytest.MonkeyPatch, kinds: tuple[str, str]
) -> None:
    """All experts in one call give what a linear each gives, with every gradient; some have no token, some 40."""
    model, numerics, _ = modules

    def half(x: Tensor) -> Tensor:
        return torch.full_like(x, 0.5)

    monkeypatch.setattr(torch, "rand_like", half)
    torch.manual_seed(2)
    experts = model.Model().backbone.layers[1].mixer.experts
    experts.__class__, experts.kinds = numerics.EmulatedExperts, kinds
    x, dy = torch.randn(50, 32), torch.randn(50, 32)
    chosen = torch.randint(5, (50, 2))
    chosen[:40, 0], chosen[:, 1] = 6, chosen[:, 1] % 3
    weights = torch.rand(50, 2)

    def by_linears(x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for e in range(8):
            rows, slots = (chosen == e).nonzero(as_tuple=True)
            up, down = (F.linear if kind == "bf16" else partial(numerics.linear, kind=kind) for kind in kinds)
            inner = up(x[rows], experts.up_proj[e]).relu().square()
            y = y.index_add(0, rows, down(inner, experts.down_proj[e]) * weights[rows, slots, None])
        return y

    results = []
    for run in (partial(experts, experts=chosen, weights=weights), by_linears):
        given = x.clone().requires_grad_()
        experts.zero_grad()
        y = run(given)
        y.backward(dy)
        results.append([y.detach(), given.grad, experts.up_proj.grad, experts.down_proj.grad])
    for got, expected in zip(*results, strict=True):
        assert expected.any()
        torch.testing.assert_close(got, expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-4)


def test_trains(modules: tuple[Any, Any, Any], tmp_path: Path) -> None:
    """train.py --numerics nvfp4 learns, differs from float32, and goes on to the same bits."""
    train = modules[2]
    (tmp_path / "text").write_bytes(b"a line that comes again and again\n" * 200)

    def run(out: str, *more: str) -> dict[str, Any]:
        given = ["--data", str(tmp_path / "text"), "--out", str(tmp_path / out), "--batch-size", "2", "--lr", "0.01"]
        given += ["--steps", "16", "--seq-len", "32", "--val-every", "0", "--save-every", "8", *more]
        assert train.main(given) == 0
        line = json.loads((tmp_path / out / "metrics.jsonl").read_text().splitlines()[-1])
        return {name: value for name, value in line.items() if not name.endswith("per_second")}

    whole = run("whole", "--numerics", "nvfp4")
    assert whole["loss"] < 3.5
    assert whole["loss"] != run("plain")["loss"]
    (tmp_path / "again").mkdir()
    (tmp_path / "whole" / "checkpoints").rename(tmp_path / "again" / "checkpoints")
    last = tmp_path / "again" / "checkpoints" / "step-000000016"
    last.rename(last.with_name(".step-unfinished"))
    assert run("again", "--numerics", "nvfp4", "--resume") == whole


def test_a_matrix_that_does_not_fit(modules: tuple[Any, Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, numerics, _ = modules
    monkeypatch.setitem(numerics.FORMATS, "backbone.layers.0.mixer.in_proj", "nvfp4")
    with pytest.raises(ValueError, match=r"layers\.0\.mixer\.in_proj \[328, 64\] does not divide"):
        numerics.emulate(model.Model())


class EngineStandIn:
    """blackwell.Engine, by the emulation; `fault` spoils its gradients, as releases of the real one do on some GPUs."""

    fault = ""
    linear: Callable[[Tensor, Tensor, str], Tensor]

    def __init__(self, module: torch.nn.Linear, kind: str) -> None:
        self.kind = kind

    def __call__(self, weights: dict[str, Tensor], x: Tensor) -> Tensor:
        if self.fault == "fails":
            raise RuntimeError("CUDA Error: invalid argument")
        y = self.linear(x, weights["weight"], self.kind)
        if self.fault == "zeros":
            y.register_hook(torch.zeros_like)
        return y


@pytest.mark.parametrize(
    ("capability", "engine", "takes"),
    [((9, 0), True, "emulate"), ((10, 0), True, "by_engine"), ((12, 1), True, "by_engine"), ((10, 0), False, "emulate"),
     ((10, 0), None, "emulate")],
)  # fmt: skip
def test_who_computes_in_low_precision(
    numerics: Any, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], engine: bool | None, takes: str
) -> None:
    """Transformer Engine from Blackwell on, where it is installed (not None), has NVFP4 and computes right."""
    blackwell = importlib.import_module(f"{numerics.__package__}.blackwell")
    looked_at = list[str]()

    def capability_of(device: torch.device) -> tuple[int, int]:
        return capability

    def require(engine: Any, kind: str, device: torch.device) -> None:
        looked_at.append(kind)

    monkeypatch.setattr(torch.cuda, "get_device_capability", capability_of)
    monkeypatch.setattr(blackwell, "require_true_products", require)
    package = None if engine is None else SimpleNamespace(is_nvfp4_available=lambda: engine)
    monkeypatch.setitem(sys.modules, "transformer_engine", None if engine is None else SimpleNamespace())
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", package)
    assert blackwell.low_precision(torch.device("cuda")) is getattr(blackwell, takes)
    assert looked_at == (sorted(set(blackwell.FORMATS.values())) if takes == "by_engine" else [])
    assert blackwell.low_precision(torch.device("cpu")) is blackwell.emulate


def test_what_transformer_engine_computes(modules: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The linears that have a format, and experts whose two matrices have one, by modules of their shapes."""
    numerics = modules[1]
    blackwell = importlib.import_module(f"{numerics.__package__}.blackwell")
    model_module = importlib.import_module(f"{numerics.__package__}.model")
    with torch.device("meta"):
        model = model_module.Model()

    def linear(inner: int, out: int, **_: Any) -> tuple[int, int]:
        return inner, out

    def grouped(count: int, inner: int, out: int, **_: Any) -> tuple[int, int, int]:
        return count, inner, out

    def engine(module: Any, kind: str) -> tuple[Any, str]:
        return module, kind

    package = SimpleNamespace(Linear=linear, GroupedLinear=grouped)
    monkeypatch.setitem(sys.modules, "transformer_engine", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", package)
    monkeypatch.setattr(blackwell, "Engine", engine)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    blackwell.by_engine(model)
    engines: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, blackwell.EngineExperts):
            engines |= dict(zip((f"{name}.up_proj", f"{name}.down_proj"), module.engines, strict=True))
        elif isinstance(module, blackwell.EngineLinear):
            engines[name] = module.engine
    assert engines.keys() == blackwell.FORMATS.keys()
    for name, (shape, kind) in engines.items():
        *count, out, inner = shapes.get(f"{name}.weight") or shapes[name]
        assert (shape, kind) == ((*count, inner, out), blackwell.FORMATS[name])


@pytest.mark.parametrize(
    ("fault", "message"),
    [("", ""), ("zeros", "its dx in nvfp4 is off by 100% on this GPU"), ("fails", "fails in nvfp4 on this GPU: CUDA")],
)
def test_gate_against_faults_of_transformer_engine(
    numerics: Any, monkeypatch: pytest.MonkeyPatch, fault: str, message: str
) -> None:
    """Products and gradients of one linear are looked at before a run: pull request 3281, issue 3062 of it."""
    blackwell = importlib.import_module(f"{numerics.__package__}.blackwell")
    engine = type("Engine", (EngineStandIn,), {"fault": fault, "linear": staticmethod(numerics.linear)})
    monkeypatch.setattr(blackwell, "Engine", engine)

    def linear(size: int, out: int, bias: bool, params_dtype: torch.dtype, device: torch.device) -> torch.nn.Linear:
        return torch.nn.Linear(size, out, bias, device, params_dtype)

    def check() -> None:
        for kind in ("nvfp4", "mxfp8"):
            blackwell.require_true_products(
                SimpleNamespace(Linear=linear),
                kind,
                torch.device("cpu"),
            )

    if not message:
        check()
        return
    with pytest.raises(ValueError, match=message):
        check()
