"""The parts of a generated model: the scan, its states, the router, the experts, initialisation."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from .generated import generate, tiny_spec


@pytest.fixture(scope="module")
def module() -> Any:
    return generate(tiny_spec())


@pytest.fixture
def model(module: Any) -> Any:
    torch.manual_seed(1)
    return module.Model().eval()


def recurrence(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_(t-1) + dt_t x_t B_t^T, y_t = h_t C_t, token by token and head by head."""
    groups, heads = B.shape[2], x.shape[2]
    ys: list[Tensor] = []
    hs: list[Tensor] = []
    for b in range(x.shape[0]):
        for i in range(heads):
            group = i * groups // heads
            state = h[b, i]
            for t in range(x.shape[1]):
                added = dt[b, t, i] * torch.outer(x[b, t, i], B[b, t, group])
                state = state * torch.exp(dt[b, t, i] * A[i]) + added
                ys.append(state @ C[b, t, group])
            hs.append(state)
    y = torch.stack(ys).view(x.shape[0], heads, x.shape[1], x.shape[3]).transpose(1, 2)
    return y, torch.stack(hs).view_as(h)


def scan_inputs(length: int, heads: int = 6, groups: int = 3) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(length)
    x = torch.randn(2, length, heads, 4, generator=g)
    dt = torch.rand(2, length, heads, generator=g)
    A = -torch.linspace(0.1, 40, heads)
    B, C = torch.randn(2, 2, length, groups, 5, generator=g).unbind(0)
    return x, dt, A, B, C, torch.randn(2, heads, 4, 5, generator=g)


@pytest.mark.parametrize("chunk", [1, 4, 7, 64])
@pytest.mark.parametrize("length", [1, 3, 8, 13])
def test_ssd_is_the_recurrence(module: Any, length: int, chunk: int) -> None:
    inputs = scan_inputs(length)
    expected_y, expected_h = recurrence(*(t.double() for t in inputs))
    y, h = module.ssd.ssd(*inputs, chunk)
    assert y.dtype == h.dtype == torch.float32
    torch.testing.assert_close(y.double(), expected_y, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(h.double(), expected_h, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 13])
def test_the_graph_of_ssd_is_the_recurrence(module: Any, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is exported, for any length and without a loop; chunks of 4, of which the last one may be padded."""
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    inputs = scan_inputs(length)
    y, h = module.ssd.ssd(*inputs, 4)
    expected_y, expected_h = recurrence(*(t.double() for t in inputs))
    torch.testing.assert_close(y.double(), expected_y, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(h.double(), expected_h, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize(
    ("length", "dtype", "size", "fast"),
    [
        (3, torch.float32, (4, 5), True),
        (1, torch.float32, (4, 5), False),
        (3, torch.bfloat16, (4, 5), False),
        (3, torch.bfloat16, (64, 128), True),
        (1, torch.bfloat16, (64, 128), False),
    ],
)
def test_kernels_scan_what_they_were_found_right_for(
    module: Any, monkeypatch: pytest.MonkeyPatch, length: int, dtype: torch.dtype, size: tuple[int, int], fast: bool
) -> None:
    """Several tokens in float32, or in bfloat16 with heads of one size; a token behind a state is a step."""
    P, N = size
    x, B, C = (torch.zeros(1, length, 2, channels, dtype=dtype) for channels in (P, N, N))
    dt, A, state = torch.ones(1, length, 2), -torch.ones(2), torch.zeros(1, 2, P, N)
    answer = (x + 1, state + 1)

    def scan(*_: object) -> tuple[Tensor, Tensor]:
        return answer

    def kernels(_: Tensor) -> SimpleNamespace:
        return SimpleNamespace(mamba2=SimpleNamespace(scan=scan))

    monkeypatch.setattr(module.ssd, "kernels", kernels)
    assert (module.ssd.scan(x, dt, A, B, C, 4, state)[0] is answer[0]) is fast


def test_ssd_step_is_ssd(module: Any) -> None:
    *inputs, state = scan_inputs(1)
    expected_y, expected_h = module.ssd.ssd(*inputs, state, 4)
    torch.testing.assert_close(module.ssd.ssd_step(*inputs, state), expected_y)
    torch.testing.assert_close(state, expected_h)


def test_ssd_gradients(module: Any) -> None:
    inputs = [t.double().requires_grad_() for t in scan_inputs(7, heads=2, groups=1)]
    weights = torch.randn(2, 7, 2, 4, dtype=torch.float64), torch.randn(2, 2, 4, 5, dtype=torch.float64)

    def gradients(y: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((y * weights[0]).sum() + (h * weights[1]).sum(), inputs)

    # The decay between two tokens passes through float32.
    for got, expected in zip(gradients(*module.ssd.ssd(*inputs, 3)), gradients(*recurrence(*inputs)), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_ssd_keeps_its_digits_where_decay_is_fast(module: Any) -> None:
    """Sums of dt A reach thousands in a chunk; float32 differences of them have three digits."""
    x, dt, _, B, C, h = scan_inputs(128, heads=2, groups=1)
    A = torch.tensor([-128.0, -64.0])
    expected, _ = recurrence(*(t.double() for t in (x, dt, A, B, C, h)))
    y, _ = module.ssd.ssd(x, dt, A, B, C, h, 128)
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)


def test_causality(model: Any) -> None:
    """A later token changes nothing before it, and something from it on."""
    ids = torch.arange(12).view(1, 12)
    changed = ids.clone()
    changed[0, 7] = 80
    with torch.no_grad():
        a, b = model(ids), model(changed)
    torch.testing.assert_close(a.logits[:, :7], b.logits[:, :7], atol=1e-5, rtol=0)
    assert (a.logits[:, 7:] - b.logits[:, 7:]).abs().amax(-1).min() > 1e-3
    for k, (x, y) in enumerate(zip(a.mtp_logits, b.mtp_logits, strict=True), start=1):
        torch.testing.assert_close(x[:, : 7 - k], y[:, : 7 - k], atol=1e-5, rtol=0)


def test_step_of_sequences_at_different_places(model: Any) -> None:
    """Rows of a batch may have different lengths: each then decodes as if alone."""
    ids = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 7, 1, 8, 2, 8]])
    alone = [model.allocate_state(1, 16) for _ in range(2)]
    model.step(ids[:1, :5], alone[0])
    model.step(ids[1:, :2], alone[1])
    both = model.allocate_state(2, 16)
    both.lengths.copy_(torch.tensor([5, 2]))
    both.longest = 5
    for name in ("conv", "ssm", "keys", "values"):
        for index, tensor in getattr(both, name).items():
            tensor.copy_(torch.cat([getattr(state, name)[index] for state in alone]))
    got = model.step(torch.stack([ids[0, 5:], ids[1, 2:3]]), both)
    expected = [model.step(ids[:1, 5:], alone[0]), model.step(ids[1:, 2:3], alone[1])]
    torch.testing.assert_close(got, torch.cat(expected), atol=1e-5, rtol=1e-5)
    assert both.lengths.tolist() == [6, 3]


def test_state(model: Any) -> None:
    state = model.allocate_state(3, 10)
    assert state.lengths.tolist() == [0, 0, 0] and state.lengths.dtype == torch.int64
    assert {i: tuple(t.shape) for i, t in state.conv.items()} == dict.fromkeys((0, 2, 6), (3, 3, 192))
    assert {i: tuple(t.shape) for i, t in state.ssm.items()} == dict.fromkeys((0, 2, 6), (3, 8, 16, 16))
    assert {i: tuple(t.shape) for i, t in state.keys.items()} == {3: (3, 2, 10, 24)}
    assert all(t.dtype == torch.float32 for t in state.ssm.values())
    with pytest.raises(ValueError, match="takes 10 more"):
        model.step(torch.zeros(3, 11, dtype=torch.int64), state)
    with pytest.raises(ValueError, match="3 sequences"):
        model.step(torch.zeros(2, 1, dtype=torch.int64), state)
    with pytest.raises(ValueError, match="3 x 0 tokens"):
        model.step(torch.zeros(3, 0, dtype=torch.int64), state)


def test_bfloat16_keeps_the_correction_bias_and_the_ssm_state(model: Any) -> None:
    model.backbone.layers[1].mixer.gate.e_score_correction_bias.fill_(1.001)
    ids = torch.arange(9).view(1, 9)
    with torch.no_grad():
        expected = model(ids).logits
        model.to(torch.bfloat16)
        got = model(ids).logits
    bias = model.backbone.layers[1].mixer.gate.e_score_correction_bias
    assert bias.dtype == torch.float32 and torch.equal(bias, torch.full((8,), 1.001))
    assert got.dtype == torch.float32
    assert (got - expected).abs().mean() < 0.05 * expected.abs().mean()
    state = model.allocate_state(1, 9)
    stepped = torch.cat([model.step(ids[:, t : t + 1], state) for t in range(9)], dim=1)
    assert (stepped - got).abs().mean() < 0.05 * expected.abs().mean()
    assert state.ssm[0].dtype == torch.float32 and state.keys[3].dtype == torch.bfloat16


def test_autocast_leaves_router_and_scan_in_float32(model: Any) -> None:
    mixer = model.backbone.layers[1].mixer
    calls: list[tuple[Tensor, tuple[Tensor, Tensor, None]]] = []

    def keep(_: torch.nn.Module, args: tuple[Tensor], out: tuple[Tensor, Tensor, None]) -> None:
        calls.append((args[0].float(), out))

    mixer.gate.register_forward_hook(keep)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.arange(9).view(1, 9))
    x, (experts, weights, _) = calls[0]
    with torch.no_grad():
        expected_experts, expected_weights, _ = mixer.gate(x)
    assert torch.equal(experts, expected_experts) and torch.equal(weights, expected_weights)


def test_steps_under_autocast(model: Any) -> None:
    """The caches keep the type of the weights; the logits are those of whole sequences, as well as BF16 goes."""
    ids = torch.arange(9).view(1, 9)
    with torch.no_grad():
        exact = model(ids).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            state = model.allocate_state(1, 9)
            stepped = torch.cat([model.step(ids[:, t : t + 1], state) for t in range(9)], dim=1)
    assert state.keys[3].dtype == torch.float32
    assert 0 < (stepped - exact).abs().mean() < 0.05 * exact.abs().mean()


@pytest.mark.parametrize(("inner", "width"), [(48, 32), (17, 32), (48, 11), (5, 3)])
@pytest.mark.parametrize("tokens", [1, 9])
def test_experts(module: Any, inner: int, width: int, tokens: int) -> None:
    """Grouped GEMM for many rows of whole 16 bytes, a loop elsewhere: the plain sum in both."""
    torch.manual_seed(0)
    config = module.Config(moe_intermediate_size=inner, moe_latent_size=width)
    experts = module.model.Experts(config)
    torch.nn.init.normal_(experts.up_proj)
    torch.nn.init.normal_(experts.down_proj)
    x = torch.randn(tokens, width, requires_grad=True)
    chosen = torch.stack([torch.randperm(8)[:3] for _ in range(tokens)])
    weights = torch.rand(tokens, 3)
    got = experts(x, chosen, weights)
    rows = []
    for n in range(tokens):
        parts = [
            weights[n, k] * (experts.down_proj[e] @ torch.relu(experts.up_proj[e] @ x[n]) ** 2)
            for k, e in enumerate(chosen[n].tolist())
        ]
        rows.append(torch.stack(parts).sum(0))
    expected = torch.stack(rows)
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-5)
    parameters = (x, experts.up_proj, experts.down_proj)
    seed = torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad(got, parameters, seed), torch.autograd.grad(expected, parameters, seed), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-2, rtol=1e-5)


@pytest.mark.parametrize("multiple", [1, 2, 4])
def test_sort_by_expert(module: Any, multiple: int) -> None:
    """An expert's rows are those of the tokens that chose it, in order, then zeros up to the multiple."""
    torch.manual_seed(0)
    x, chosen, weights = torch.randn(2, 5, 3), torch.randint(4, (2, 5, 2)), torch.rand(2, 5, 2)
    chosen[chosen == 1] = 5  # which leaves an expert without rows
    rows, counts, position = module.grouped.sort_by_expert(x, chosen, 6, multiple)
    tokens = x.flatten(0, 1)
    for e, part in enumerate(rows.split(counts.tolist())):
        own = tokens[(chosen.flatten(0, 1) == e).nonzero()[:, 0]]
        assert torch.equal(part, torch.cat([own, own.new_zeros(-len(own) % multiple, 3)]))
    assert counts[1] == 0
    assert torch.equal(rows[position], tokens.repeat_interleave(2, 0))
    got = module.grouped.weighted_sum(rows, position, weights)
    torch.testing.assert_close(got, x * weights.sum(-1, keepdim=True))


@pytest.mark.parametrize("multiple", [4, 16])
def test_sort_by_expert_on_a_gpu(module: Any, monkeypatch: pytest.MonkeyPatch, multiple: int) -> None:
    """How many rows there are is not asked: there are as many as there might be, what is left for the last expert."""
    x, chosen = torch.randn(7, 3), torch.tensor([[0, 2], [0, 2], [0, 3], [0, 1], [0, 2], [0, 1], [5, 0]])
    expected, counts, position = module.grouped.sort_by_expert(x, chosen, 6, multiple)
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "is_cuda", True)
        rows, by_expert, place = module.grouped.sort_by_expert(x, chosen, 6, multiple)
    most = -(-(14 + 6 * (multiple - 1)) // multiple) * multiple
    assert len(rows) == by_expert.sum() == most
    assert torch.equal(by_expert[:-1], counts[:-1]) and torch.equal(place, position)
    assert torch.equal(rows[: len(expected)], expected) and not rows[len(expected) :].any()


@pytest.mark.parametrize(
    ("dtype", "width", "out", "supported", "exported"),
    [
        (torch.bfloat16, 16, 24, True, True),
        (torch.bfloat16, 12, 24, False, False),
        (torch.bfloat16, 16, 20, False, False),
        (torch.float32, 12, 20, True, False),
        (torch.float32, 10, 20, False, False),
        (torch.float32, 12, 18, False, False),
        (torch.float16, 16, 8, True, False),
        (torch.float64, 16, 8, False, False),
    ],
)
def test_which_products_a_grouped_gemm_computes(
    module: Any,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    width: int,
    out: int,
    supported: bool,
    exported: bool,
) -> None:
    """Of rows of a multiple of 16 bytes, on a CPU; in graphs in bfloat16 only, and elsewhere no float32."""
    x, weight = torch.zeros(2, width, dtype=dtype), torch.zeros(3, out, width, dtype=dtype)
    assert module.grouped.grouped_gemm_supports(x, weight) is supported
    assert module.grouped.grouped_gemm_supports(x.to("meta"), weight.to("meta")) is exported
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert module.grouped.grouped_gemm_supports(x, weight) is exported


@pytest.mark.parametrize(("groups", "best"), [(2, 1), (4, 1), (4, 2)])
def test_experts_are_of_the_best_groups(groups: int, best: int) -> None:
    """A group counts its two best experts; the bias chooses, and does not weigh. In loops over tokens."""
    torch.manual_seed(2)
    router = generate(tiny_spec("ME", None, n_group=groups, topk_group=best, top_k=2)).Model().eval().routers()[0]
    with torch.no_grad():
        router.e_score_correction_bias.uniform_(-0.2, 0.2)
        router.weight.normal_()
    x = torch.randn(1, 40, 64)
    experts, weights, _ = router(x)
    scores = (x @ router.weight.T).sigmoid()
    size = 8 // groups
    within = 0
    for t in range(40):
        choice = (scores[0, t] + router.e_score_correction_bias).tolist()
        by_group = [sum(sorted(choice[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
        open_groups = sorted(range(groups), key=lambda group: by_group[group])[-best:]
        allowed = [e for e in range(8) if e // size in open_groups]
        chosen = sorted(allowed, key=lambda e: choice[e])[-2:]
        assert set(experts[0, t].tolist()) == set(chosen)
        within += set(chosen) == set(sorted(range(8), key=lambda e: choice[e])[-2:])
        of_chosen = scores[0, t, experts[0, t]]
        torch.testing.assert_close(weights[0, t], 2.5 * of_chosen / of_chosen.sum())
    assert 0 < within < 40  # groups matter for some tokens


def test_initialisation(module: Any) -> None:
    torch.manual_seed(0)
    with torch.device("meta"):
        model = module.Model(module.Config(hidden_size=256, initializer_range=0.02))
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(torch.nan)
    model.init_weights()
    weights = model.state_dict()
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    mamba = {k.removeprefix("backbone.layers.0.mixer."): v for k, v in weights.items()}
    A = mamba["A_log"].exp()
    assert A.min() >= 1 and A.max() <= 16 and len(A.unique()) == 8
    assert torch.equal(mamba["D"], torch.ones(8))
    dt = torch.nn.functional.softplus(mamba["dt_bias"])
    assert dt.min() >= 0.000999 and dt.max() <= 0.1001 and len(dt.unique()) == 8
    for name in ("backbone.embeddings.weight", "lm_head.weight", "backbone.layers.0.mixer.in_proj.weight"):
        assert abs(weights[name].std().item() - 0.02) < 0.001, name
    for name, tensor in weights.items():
        if name.endswith(
            ("out_proj.weight", "o_proj.weight", "down_proj.weight", "down_proj", "fc2_latent_proj.weight")
        ):
            assert tensor.std().item() == pytest.approx(0.02 / math.sqrt(8), rel=0.05), name
        elif name.endswith(("gate.weight", "experts.up_proj", "eh_proj.weight", "fc1_latent_proj.weight")):
            assert tensor.std().item() == pytest.approx(0.02, rel=0.05), name
        elif "norm" in name:
            assert torch.equal(tensor, torch.ones_like(tensor)), name
        elif name.endswith("e_score_correction_bias"):
            assert not tensor.any()
        elif "conv1d" in name:  # uniform within 1 / sqrt(4 taps), as nn.Conv1d
            assert tensor.abs().max() <= 0.5 and tensor.min() < -0.45 and tensor.max() > 0.45, name
            assert tensor.std().item() == pytest.approx(0.5 / math.sqrt(3), rel=0.1), name
