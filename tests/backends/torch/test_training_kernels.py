"""The Triton kernels of a package, interpreted in float32, against definitions of what they compute in float64."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from n3c.backends.torch.loading import load_package

from .generated import imported, tiny_spec, write_generated
from .kernel_memory import kernel_memory as kernel_memory

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="the interpreter is chosen before Triton is imported"
    ),
    pytest.mark.usefixtures("kernel_memory"),
]
BOUNDARIES = (1, 2, 31, 64, 70)  # first tokens of documents: at the edges of tiles and of chunks of 64, and inside


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a generated package, whose kernels are read from its folder when they are first used."""
    folder = tmp_path_factory.mktemp("kernels")
    write_generated(tiny_spec(), folder)
    return load_package(folder)


@pytest.fixture(scope="module")
def kernels(package: Any) -> SimpleNamespace:
    names = ("activation", "adamw", "convolution", "cross_entropy", "experts", "grouped", "mamba2", "norm", "ssd")
    return SimpleNamespace(**{name: importlib.import_module(f"{package.__name__}.kernels.{name}") for name in names})


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield


def documents_of(batch: int, length: int) -> Tensor:
    first = torch.arange(length)[:, None] >= torch.tensor(BOUNDARIES)
    return first.sum(1, dtype=torch.int32).expand(batch, length).contiguous()


def anywhere(*_: object) -> bool:
    return True


def same(name: str, got: Tensor, expected: Tensor, bound: float = 1e-5) -> None:
    """Compare to the largest entry, or to 1."""
    error = float((got - expected).detach().abs().max() / expected.detach().abs().max().clamp(min=1))
    assert error <= bound, f"{name}: {error:.1e}"


def compare(function: Any, definition: Any, inputs: dict[str, Tensor]) -> None:
    """Compare outputs and gradients by all inputs with those of a definition in float64."""
    ours = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    exact = {name: tensor.double().requires_grad_() for name, tensor in inputs.items()}
    got, expected = function(**ours), definition(**exact)
    got, expected = (out if isinstance(out, tuple) else (out,) for out in (got, expected))
    seeds = [torch.randn_like(out) for out in got]
    for index, pair in enumerate(zip(got, expected, strict=True)):
        same(f"output {index}", *pair)
    by_ours = torch.autograd.grad(got, list(ours.values()), seeds)
    by_exact = torch.autograd.grad(expected, list(exact.values()), [seed.double() for seed in seeds])
    for name, a, b in zip(inputs, by_ours, by_exact, strict=True):
        same(f"gradient of {name}", a, b)


def recurrence(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None, documents: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return y and the last state, token by token."""
    repeats = x.shape[2] // B.shape[2]
    into, out_of = B.repeat_interleave(repeats, 2), C.repeat_interleave(repeats, 2)  # [B, S, H, N]
    h = torch.zeros_like(x[:, 0, :, :, None] * into[:, 0, :, None]) if state is None else state
    outputs: list[Tensor] = []
    for t in range(x.shape[1]):
        if documents is not None and t:
            h = h * (documents[:, t] == documents[:, t - 1])[:, None, None, None]
        added = (x[:, t] * dt[:, t, :, None])[..., None] * into[:, t, :, None]
        h = h * (dt[:, t] * A).exp()[..., None, None] + added
        outputs.append((h * out_of[:, t, :, None]).sum(-1))
    return torch.stack(outputs, 1), h


@pytest.mark.parametrize(
    ("batch", "length", "heads", "groups", "channels", "states", "packed", "continued"),
    [
        (1, 50, 4, 2, 16, 16, False, False),
        (2, 150, 4, 2, 3, 5, True, True),
        (1, 130, 2, 1, 32, 16, True, False),
        (2, 64, 4, 4, 8, 24, False, True),
        (2, 1, 2, 1, 16, 16, False, True),
    ],
)
def test_scan(
    kernels: Any,
    batch: int,
    length: int,
    heads: int,
    groups: int,
    channels: int,
    states: int,
    packed: bool,
    continued: bool,
) -> None:
    documents = documents_of(batch, length) if packed else None
    inputs = {
        "x": torch.randn(batch, length, heads, channels),
        "dt": torch.rand(batch, length, heads) * 0.5,
        "A": -torch.linspace(0.1, 16, heads),
        "B": torch.randn(batch, length, groups, states),
        "C": torch.randn(batch, length, groups, states),
    }
    if continued:
        inputs["state"] = torch.randn(batch, heads, channels, states)

    def scan(state: Tensor | None = None, **rest: Tensor) -> Any:
        return kernels.mamba2.scan(**rest, state=state, documents=documents)

    def definition(state: Tensor | None = None, **rest: Tensor) -> Any:
        return recurrence(**rest, state=state, documents=documents)

    compare(scan, definition, inputs)


def test_scan_by_larger_chunks(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of bfloat16."""
    monkeypatch.setattr(kernels.ssd, "CHUNKS", {4: 64})
    sizes = {"batch": 2, "length": 150, "heads": 4, "groups": 2, "channels": 16, "states": 16}
    test_scan(kernels, **sizes, packed=True, continued=True)
    test_scan(kernels, **sizes, packed=False, continued=False)


@pytest.mark.parametrize(
    ("heads", "channels", "split"),
    [(66, 80, (2, 64)), (67, 80, (1, 128)), (16, 200, (4, 64)), (34, 200, (2, 128)), (1, 64, (1, 64)), (1, 5, (1, 16))],
)
def test_heads_are_divided_until_the_gpu_is_half_full(
    kernels: Any, monkeypatch: pytest.MonkeyPatch, heads: int, channels: int, split: tuple[int, int]
) -> None:
    """Of 132 processors; a part has a power of two of channels, 64 at least. A CPU needs no parts."""

    def properties(device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(multi_processor_count=132)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    assert kernels.ssd.split_of(heads, channels, torch.device("cuda")) == split
    assert kernels.ssd.split_of(heads, channels, torch.device("cpu"))[0] == 1


def test_scan_in_parts(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are few heads, several programs share the channels of one; those of a whole batch count."""
    asked: list[tuple[int, int]] = []

    def in_two(heads: int, channels: int, _: torch.device) -> tuple[int, int]:
        asked.append((heads, channels))
        return 2, 16

    monkeypatch.setattr(kernels.ssd, "split_of", in_two)
    sizes = {"batch": 2, "length": 70, "heads": 2, "groups": 1, "channels": 24, "states": 16}
    test_scan(kernels, **sizes, packed=True, continued=True)
    assert asked == 2 * [(4, 24)]  # forwards and backwards


def test_scan_of_slices(kernels: Any) -> None:
    """What lies side by side, as after the convolution, is read where it is; no other order of axes is taken for it."""
    wide = torch.randn(2, 20, 4 * 16 + 8)
    x = wide[..., :64].unflatten(-1, (4, 16))
    assert kernels.mamba2.laid_out(x).data_ptr() == wide.data_ptr()
    for other in (torch.randn(2, 4, 20, 16).transpose(1, 2), torch.randn(2, 20, 16, 4).mT, torch.randn(2, 20, 4, 18)):
        cut = other[..., :16]
        assert torch.equal(kernels.mamba2.laid_out(cut), cut)
        assert kernels.mamba2.laid_out(cut).is_contiguous()


def convolution(x: Tensor, taps: Tensor, bias: Tensor | None, documents: Tensor | None) -> Tensor:
    total = torch.zeros_like(x) if bias is None else bias.expand_as(x)
    for k in range(taps.shape[1]):
        back = taps.shape[1] - 1 - k
        shifted = F.pad(x, (0, 0, back, 0))[:, : x.shape[1]]
        if documents is not None and back:
            visible = F.pad(documents[:, back:] == documents[:, :-back], (back, 0))
            shifted = shifted * visible[..., None]
        total = total + shifted * taps[:, k]
    return F.silu(total)


@pytest.mark.parametrize(("width", "taps", "packed", "biased"), [(40, 4, True, True), (130, 3, False, False)])
def test_convolution(kernels: Any, width: int, taps: int, packed: bool, biased: bool) -> None:
    """Of a slice of a wider tensor, and with its gradient written to a slice of one."""
    wide = torch.randn(2, 75, width + 7)
    x, weight, bias = wide[..., 3 : 3 + width], torch.randn(width, taps), torch.randn(width) if biased else None
    documents = documents_of(2, 75) if packed else None
    exact = [t.double().requires_grad_() for t in (x, weight, bias) if t is not None]
    expected = convolution(exact[0], exact[1], exact[2] if biased else None, documents)
    y = kernels.convolution.run_forward(x, weight, bias, documents)
    same("y", y, expected)
    dy, target = torch.randn_like(y), torch.full_like(wide, torch.nan)
    wanted = torch.autograd.grad(expected, exact, dy.double())
    dx = target[..., 3 : 3 + width]
    dweight, dbias = kernels.convolution.run_backward(x, weight, bias, documents, dy, dx)
    for name, pair in zip(("x", "weight", "bias"), zip((dx, dweight, dbias), wanted, strict=False), strict=False):
        same(name, *pair)
    assert target[..., :3].isnan().all() and target[..., 3 + width :].isnan().all()


def gated_norm(y: Tensor, z: Tensor | None, weight: Tensor, groups: int) -> Tensor:
    v = (y if z is None else y * F.silu(z)).unflatten(-1, (groups, -1))
    root = (v.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    n: Tensor = (v / root).flatten(-2)
    return n * weight


@pytest.mark.parametrize(("width", "groups", "gated"), [(24, 1, False), (96, 4, True)])
def test_norm(kernels: Any, width: int, groups: int, gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five tiles of tokens, of which a program of the gradient has two or three."""
    monkeypatch.setattr(kernels.norm, "ELEMENTS", 256)
    monkeypatch.setattr(kernels.norm, "PROGRAMS", 2 * groups)
    y, wide, weight = torch.randn(37, width), torch.randn(37, width + 5), torch.randn(width)
    z = wide[:, 2:-3] if gated else None
    exact = {"y": y.double().requires_grad_(), "weight": weight.double().requires_grad_()}
    if z is not None:
        exact["z"] = z.double().requires_grad_()
    expected = gated_norm(exact["y"], exact.get("z"), exact["weight"], groups)
    same("output", kernels.norm.run_forward(y, z, weight, groups, 1e-5), expected)
    given, dz = torch.randn_like(y), torch.full_like(wide, torch.nan)[:, 2:-3] if gated else None
    dy, dweight = kernels.norm.run_backward(y, z, weight, groups, 1e-5, given, dz)
    wanted = torch.autograd.grad(expected, list(exact.values()), given.double())
    found = (dy, dweight) if dz is None else (dy, dweight, dz)
    for name, got, value in zip(exact, found, wanted, strict=True):
        same(name, got, value)


def test_rms_norm(kernels: Any) -> None:
    """Of a tensor of several axes that is not contiguous."""

    def definition(x: Tensor, weight: Tensor) -> Tensor:
        return gated_norm(x, None, weight, 1)

    inputs = {"x": torch.randn(3, 24, 5).mT, "weight": torch.randn(24)}
    compare(partial(kernels.norm.rms_norm, eps=1e-5), definition, inputs)


@pytest.mark.parametrize("packed", [False, True])
def test_mixer(kernels: Any, packed: bool) -> None:
    """Mamba-2 between its projections as a whole, by the equations of model.py."""
    batch, length, heads, channels, groups, states = 2, 75, 4, 16, 2, 16
    inner, shared = heads * channels, groups * states
    documents = documents_of(batch, length) if packed else None
    inputs = {
        "zxBCdt": torch.randn(batch, length, 2 * inner + 2 * shared + heads),
        "taps": 0.3 * torch.randn(inner + 2 * shared, 4),
        "tap_bias": torch.randn(inner + 2 * shared),
        "dt_bias": torch.randn(heads) - 1,
        "A_log": 2 * torch.rand(heads),
        "D": torch.randn(heads),
        "weight": torch.randn(inner),
    }

    def definition(
        zxBCdt: Tensor, taps: Tensor, tap_bias: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor, weight: Tensor
    ) -> Tensor:
        z, xBC, dt = torch.split(zxBCdt, [inner, inner + 2 * shared, heads], -1)
        xBC = convolution(xBC, taps, tap_bias, documents)
        x, B, C = (t.unflatten(-1, (count, -1)) for t, count in zip(
            torch.split(xBC, [inner, shared, shared], -1), (heads, groups, groups), strict=True
        ))  # fmt: skip
        y, _ = recurrence(x, F.softplus(dt + dt_bias), -A_log.exp(), B, C, None, documents)
        return gated_norm((y + D[:, None] * x).flatten(2), z, weight, groups)

    options = {"groups": groups, "states": states, "eps": 1e-5, "documents": documents}
    compare(partial(kernels.mamba2.mixer, **options), definition, inputs)


def test_mixer_of_a_module(package: Any, kernels: Any) -> None:
    """The kernels are given a block's own parameters."""
    model = importlib.import_module(f"{package.__name__}.model")
    module = next(part for part in package.Model().modules() if isinstance(part, model.Mamba2))
    x = torch.randn(2, 20, module.in_proj.in_features)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.rand_like(parameter))
        inner = kernels.mamba2.between_projections(module, module.in_proj(x), None)
        same("output", module.out_proj(inner), module(x))


def test_experts(kernels: Any) -> None:
    """Every choice of a token; one expert has none."""
    experts = torch.rand(2, 37, 7).topk(3).indices
    inputs = {
        "x": torch.randn(2, 37, 32),
        "up": torch.randn(8, 48, 32),
        "down": torch.randn(8, 32, 48),
        "weights": torch.rand(2, 37, 3),
    }

    def definition(x: Tensor, up: Tensor, down: Tensor, weights: Tensor) -> Tensor:
        inner = F.relu(torch.einsum("btkil,btl->btki", up[experts], x)).square()
        return torch.einsum("btkli,btki,btk->btl", down[experts], inner, weights)

    compare(partial(kernels.experts.experts, experts=experts), definition, inputs)


def test_grouped_linear(kernels: Any) -> None:
    """Groups of no row, one row, less and more than a tile; widths that tiles do not divide."""
    rows = torch.tensor([0, 1, 69, 0, 20, 70])
    ends, expert = rows.cumsum(0, dtype=torch.int32), torch.repeat_interleave(torch.arange(6), rows)
    inputs = {"x": torch.randn(160, 70), "weight": torch.randn(6, 66, 70)}

    def definition(x: Tensor, weight: Tensor) -> Tensor:
        return torch.einsum("moi,mi->mo", weight[expert], x)

    compare(partial(kernels.grouped.grouped_linear, ends=ends), definition, inputs)


def test_squared_relu(kernels: Any) -> None:
    def definition(h: Tensor) -> Tensor:
        return F.relu(h).square()

    compare(kernels.activation.squared_relu, definition, {"h": torch.randn(70, 90)})


@pytest.mark.parametrize("vocabulary", [64, 97, 300])
def test_cross_entropy(kernels: Any, vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that the vocabulary fills, and not; a target to ignore."""
    monkeypatch.setattr(kernels.cross_entropy, "BLOCK", 64)
    logits, targets = 5 * torch.randn(11, vocabulary), torch.randint(vocabulary, (11,))
    targets[3] = -100
    exact = logits.double().requires_grad_()
    losses = F.cross_entropy(exact, targets, reduction="none")
    (wanted,) = torch.autograd.grad(losses.sum(), exact)
    kept = logits.clone()
    same("losses", kernels.cross_entropy.cross_entropy(kept, targets, -100, False), losses)
    assert torch.equal(kept, logits)
    same("losses", kernels.cross_entropy.cross_entropy(logits, targets, -100, True), losses)
    same("gradient", logits, wanted)


def test_loss_by_chunks(package: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three chunks of 12 tokens, the last one short, whose logits a kernel differentiates."""
    loss = importlib.import_module(f"{package.__name__}.loss")
    x, weight, targets = torch.randn(30, 24), torch.randn(97, 24), torch.randint(97, (30,))
    targets[::7] = -100
    monkeypatch.setattr(importlib.import_module(f"{package.__name__}.dispatch"), "on_gpu", anywhere)
    monkeypatch.setattr(loss, "MIN_CHUNK", 5)
    monkeypatch.setattr(loss, "GPU_LOGITS", 12 * 97 * 4)
    assert [(part.start, part.stop) for part in loss.chunks_of(x, 12)] == [(0, 12), (12, 24), (24, 36)]
    assert len([*loss.chunks_of(x, 4)]) == len([*loss.chunks_of(x, 5)]) == 6

    def definition(x: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(x @ weight.T, targets, reduction="sum")

    compare(partial(loss.linear_cross_entropy, targets=targets), definition, {"x": x, "weight": weight})
    with torch.no_grad():
        same("loss", loss.linear_cross_entropy(x, weight, targets), definition(x, weight))


@pytest.mark.parametrize("halves", [False, True])
def test_adamw(package: Any, kernels: Any, halves: bool) -> None:
    """Three steps equal those in PyTorch, which test_split_weights.py holds against torch's AdamW."""
    optimizer = importlib.import_module(f"{package.__name__}.training.optimizer")
    value, factor = torch.randn(5000), torch.tensor(0.5)
    pairs = [optimizer.split(value) if halves else (value.clone(), None) for _ in range(2)]
    moments = [(torch.zeros(5000), torch.zeros(5000)) for _ in range(2)]
    for step in (1, 2, 3):
        gradient = torch.randn(5000)
        options = {"rate": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "decay": 0.1, "step": step}
        for update, (p, rest), (m, v) in zip((kernels.adamw.adamw, optimizer.adamw), pairs, moments, strict=True):
            update(p, rest, gradient, m, v, factor, **options)
    got, expected = ((optimizer.joined(*pair) if halves else pair[0]) for pair in pairs)
    same("value", got, expected, 1e-7)
    same("moment", moments[0][1], moments[1][1], 1e-7)
    before = [t.clone() for t in (got, *moments[0])]
    kernels.adamw.adamw(*pairs[0], gradient, *moments[0], torch.tensor(-1.0), **options)
    after = optimizer.joined(*pairs[0]) if halves else pairs[0][0]
    assert all(torch.equal(a, b) for a, b in zip(before, (after, *moments[0]), strict=True))


@pytest.fixture
def bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of bfloat16, which the interpreter would do with their bits as integers; it rounds towards zero."""
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    language: Any = importlib.import_module("triton.language")
    product = interpreter.InterpreterBuilder.create_dot

    def widened(operand: Any) -> Any:
        if operand.dtype.scalar != language.bfloat16:
            return operand
        values = torch.from_numpy(operand.data.astype("int32")) << 16
        return interpreter.TensorHandle(values.view(torch.float32).numpy(), language.float32)

    def create_dot(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
        return product(builder, widened(a), widened(b), *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.mark.usefixtures("bfloat16")
@pytest.mark.parametrize("packed", [False, True])
def test_scan_in_bfloat16(kernels: Any, packed: bool) -> None:
    """At the sizes of a head of Nano, relative to the norm: a few units of 2^-8, in gradients, too."""
    documents = documents_of(1, 150) if packed else None
    x, B, C = torch.randn(1, 150, 4, 64), torch.randn(1, 150, 2, 128), torch.randn(1, 150, 2, 128)
    dt, A = F.softplus(torch.randn(1, 150, 4) - 3), -torch.linspace(1, 16, 4)
    inputs = [x.bfloat16(), dt, A, B.bfloat16(), C.bfloat16()]
    ours = [t.clone().requires_grad_() for t in inputs]
    exact = [t.double().requires_grad_() for t in inputs]
    got = kernels.mamba2.scan(*ours, None, documents)
    expected = recurrence(exact[0], exact[1], exact[2], exact[3], exact[4], None, documents)
    seeds = [torch.randn_like(t) for t in got]
    pairs = [*zip(got, expected, strict=True)]
    by_ours = torch.autograd.grad(got, ours, seeds)
    pairs += zip(by_ours, torch.autograd.grad(expected, exact, [t.double() for t in seeds]), strict=True)
    for a, b in pairs:
        assert (a - b).norm() <= 1.5e-2 * b.norm()


@pytest.mark.usefixtures("bfloat16")
@pytest.mark.parametrize("numerics", [pytest.param("bf16", marks=pytest.mark.slow), "bf16-split"])
def test_steps_in_bfloat16(tmp_path: Path, numerics: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of train.py, packed, with MTP, grouped GEMMs and all kernels, are nearly those without kernels."""
    spec = tiny_spec("ME*-")
    write_generated(replace(spec, model=replace(spec.model, vocab_size=256)), tmp_path)
    (tmp_path / "text").write_bytes(b"a small text again " * 200)
    given = ["--data", str(tmp_path / "text"), "--out", str(tmp_path / "out"), "--steps", "9", "--batch-size", "2"]
    given += ["--seq-len", "40", "--numerics", numerics, "--document-separator", "32"]
    with imported(tmp_path) as modules:
        monkeypatch.setattr(
            importlib.import_module(modules.dispatch.__name__.replace("dispatch", "ssd")), "measured", anywhere
        )
        found: list[list[dict[str, Any]]] = []
        for choice in (modules.dispatch.on_gpu, anywhere):
            modules.dispatch.on_gpu = choice
            settings = modules.settings.parse_settings("", given)
            trainer = modules.trainer.Trainer(settings, modules.world.World(0, 1, torch.device("cpu")))
            trainer.model.train()
            lines: list[dict[str, Any]] = []
            for _ in range(2):
                trainer.train_step()
                lines += trainer.read()
            found.append(lines)
        assert modules.dispatch.triton_kernels() is not None
    for plain, fast in zip(*found, strict=True):
        for name in ("loss", "mtp_loss", "grad_norm", "balance_loss"):
            assert fast[name] == pytest.approx(plain[name], rel=2e-2), name


def test_only_measured_sizes_in_bfloat16(package: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of other sizes are scanned by PyTorch: on a GPU some gave a wrong result, without an error."""
    monkeypatch.setattr(importlib.import_module(f"{package.__name__}.dispatch"), "on_gpu", anywhere)
    ssd, x = importlib.import_module(f"{package.__name__}.ssd"), torch.zeros(1)
    assert ssd.mixer_kernels(x, 16, 32) is not None
    assert ssd.mixer_kernels(x.bfloat16(), 64, 128) is not None
    for sizes in ((32, 128), (64, 64), (128, 128)):
        assert ssd.mixer_kernels(x.bfloat16(), *sizes) is None


@pytest.mark.parametrize("packed", [pytest.param(False, marks=pytest.mark.slow), True])
def test_model(package: Any, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients of a model with every block kind, with kernels and without."""
    dispatch = importlib.import_module(f"{package.__name__}.dispatch")
    model, ids = package.Model(), torch.randint(97, (2, 70))
    documents = documents_of(2, 70) if packed else None

    def run() -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        out = model(ids, ids, documents, return_logits=False)
        (out.loss + 0.01 * out.balance_loss).backward()
        return out.loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected, wanted = run()
    monkeypatch.setattr(dispatch, "on_gpu", anywhere)
    assert dispatch.kernels(torch.zeros(1)) is not None
    loss, got = run()
    same("loss", loss, expected)
    for name, gradient in wanted.items():
        assert (got[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max().clamp(min=1e-3), name


def test_prefill_with_kernels(package: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a prompt go on from the state before; single tokens have no kernel."""
    dispatch = importlib.import_module(f"{package.__name__}.dispatch")
    model, ids = package.Model().eval(), torch.randint(97, (2, 20))
    expected = model(ids).logits
    monkeypatch.setattr(dispatch, "on_gpu", anywhere)
    state = model.allocate_state(2, 20)
    parts = [model.step(part, state) for part in ids.split([9, 1, 10], dim=1)]
    same("logits", torch.cat(parts, 1), expected)


def test_preference(package: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dispatch = importlib.import_module(f"{package.__name__}.dispatch")
    x = torch.zeros(1)
    assert dispatch.kernels(x) is None  # on a CPU
    monkeypatch.setattr(dispatch, "on_gpu", anywhere)
    assert dispatch.kernels(x.double()) is None
    for order, ours, theirs in (
        (["triton", "mamba_ssm"], True, False),
        (["mamba_ssm", "triton"], True, True),
        (["mamba_ssm"], False, True),
        ([""], False, False),
    ):
        monkeypatch.setattr(dispatch, "PREFERENCE", order)
        assert (dispatch.kernels(x) is not None, dispatch.prefer_mamba_ssm()) == (ours, theirs)


def test_what_mamba_ssm_does_not_reach(package: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its offsets have 32 bits: a view whose memory is longer goes elsewhere."""
    dispatch = importlib.import_module(f"{package.__name__}.dispatch")
    monkeypatch.setattr(Tensor, "is_cuda", True)
    x = torch.empty(1, 2**18 + 1, 2**13, device="meta")
    assert not dispatch.mamba_ssm_reaches(x) and not dispatch.mamba_ssm_reaches(x[..., :64])
    assert dispatch.mamba_ssm_reaches(x[:, 1:]) and dispatch.mamba_ssm_reaches(x[..., :64].contiguous())


@pytest.mark.parametrize(
    "capability", [pytest.param(80, marks=pytest.mark.slow), 90, pytest.param(100, marks=pytest.mark.slow), 120]
)
def test_compiles(package: Any, capability: int, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Every kernel compiles for a GPU, which need not be there, at the sizes of Nemotron 3 Nano in bfloat16."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    kept = getattr(request.config, "cache", None)  # absent under -p no:cacheprovider
    environment["TRITON_CACHE_DIR"] = str(kept.mkdir("triton") if kept else tmp_path)
    program = Path(__file__).with_name("compile_kernels.py")
    command = [sys.executable, str(program), str(Path(package.__file__).parent), str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [
        *("square_forward", "square_backward", "adamw_update", "adamw_update", "convolution_forward"),
        *("convolution_backward", "row_losses", "activation_forward", "activation_backward", "sum_rows"),
        *("grouped_rows", "grouped_weights"),
        *("norm_forward", "norm_backward", "norm_forward", "norm_backward"),
        *(3 * ("scan_forward", "state_backward", "scan_backward")),
    ]
