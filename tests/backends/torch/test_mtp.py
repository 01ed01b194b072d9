"""Multi-token prediction against a second form: transformers' blocks, and Megatron's rolled tokens."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHBlock

from support.models import small_config

from .generated import generate, imported, tiny_spec, write_generated

IDS = torch.tensor([[5, 90, 2, 33, 33, 8, 61, 7, 1], [0, 96, 44, 3, 17, 17, 29, 50, 12]])


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def block(model: Any, pattern: str, index: int) -> Any:
    """Return transformers' block with the weights of `mtp.layers.<index>`."""
    config = small_config(pattern, head_dim=24, routed_scaling_factor=2.5, attn_implementation="sdpa")
    result = NemotronHBlock(config, index)
    prefix = f"mtp.layers.{index}."
    extra = ("enorm", "hnorm", "eh_proj", "final_layernorm")
    weights = {k.removeprefix(prefix): v for k, v in model.state_dict().items() if k.startswith(prefix)}
    result.load_state_dict({k: v for k, v in weights.items() if not k.startswith(extra)})
    return result.eval()


def roll(x: Tensor) -> Tensor:
    """Shift one token to the left; the last place gets a token that nothing may depend on."""
    return torch.cat([x[:, 1:], torch.full_like(x[:, :1], 11)], dim=1)


@torch.no_grad()
def second_form(model: Any, pattern: str, depth: int, ids: Tensor) -> list[Tensor]:
    """Return the logits of each depth, all places [B, S, V]; the last `depth` places mean nothing."""
    weights = model.state_dict()
    blocks = [block(model, pattern, index) for index in range(len(pattern))]
    (h, _), tokens, logits = model.backbone(ids), ids, []
    for _ in range(depth):
        tokens = roll(tokens)
        e = norm(weights["backbone.embeddings.weight"][tokens], weights["mtp.layers.0.enorm.weight"])
        h = torch.cat([e, norm(h, weights["mtp.layers.0.hnorm.weight"])], dim=-1)
        h = h @ weights["mtp.layers.0.eh_proj.weight"].T
        for layer in blocks:
            h = layer(h)
        h = norm(h, weights[f"mtp.layers.{len(pattern) - 1}.final_layernorm.weight"])
        logits.append(h @ weights["lm_head.weight"].T)
    return logits


def by_positions(model: Any, pattern: str, depth: int, ids: list[int], h: Tensor) -> list[list[Tensor]]:
    """Return the logits [V] of each depth and position of one sequence, by loops over positions, heads and experts.

    `h` [S, D] is the backbone's output. Nothing is shared with the generated code but the weights.
    """
    w = {name: tensor.double() for name, tensor in model.state_dict().items()}
    hs, logits = list(h.double()), []
    for k in range(1, depth + 1):
        xs = []
        for t in range(len(ids) - k):
            e = norm(w["backbone.embeddings.weight"][ids[t + k]], w["mtp.layers.0.enorm.weight"])
            merged = torch.cat([e, norm(hs[t], w["mtp.layers.0.hnorm.weight"])])
            xs.append(w["mtp.layers.0.eh_proj.weight"] @ merged)
        for i, symbol in enumerate(pattern):
            block = {n.removeprefix(f"mtp.layers.{i}."): v for n, v in w.items() if n.startswith(f"mtp.layers.{i}.")}
            normed = [norm(x, block["norm.weight"]) for x in xs]
            added = (
                attention_by_positions(block, normed) if symbol == "*" else [moe_by_experts(block, x) for x in normed]
            )
            xs = [x + y for x, y in zip(xs, added, strict=True)]
        hs = [norm(x, w[f"mtp.layers.{len(pattern) - 1}.final_layernorm.weight"]) for x in xs]
        logits.append([w["lm_head.weight"] @ x for x in hs])
    return logits


def attention_by_positions(w: dict[str, Tensor], xs: list[Tensor]) -> list[Tensor]:
    """4 query heads of 24 channels on 2 key heads."""
    qs, ks, vs = ([w[f"mixer.{name}_proj.weight"] @ x for x in xs] for name in "qkv")
    ys = []
    for t in range(len(xs)):
        heads = []
        for i in range(4):
            q, shared = qs[t][24 * i : 24 * i + 24], slice(24 * (i // 2), 24 * (i // 2) + 24)
            scores = torch.stack([(q @ ks[j][shared]) / 24**0.5 for j in range(t + 1)]).exp()
            heads.append(sum(scores[j] * vs[j][shared] for j in range(t + 1)) / scores.sum())
        ys.append(w["mixer.o_proj.weight"] @ torch.cat(heads))
    return ys


def moe_by_experts(w: dict[str, Tensor], x: Tensor) -> Tensor:
    """3 of 8 latent experts, scaled by 2.5, and the shared one."""
    scores = [1 / (1 + (-(row @ x)).exp()) for row in w["mixer.gate.weight"]]
    biased = [float(s + b) for s, b in zip(scores, w["mixer.gate.e_score_correction_bias"], strict=True)]
    chosen = sorted(range(8), key=lambda e: -biased[e])[:3]
    latent, routed = w["mixer.fc1_latent_proj.weight"] @ x, torch.zeros(32, dtype=torch.float64)
    for e in chosen:
        inner = (w["mixer.experts.up_proj"][e] @ latent).clamp(min=0) ** 2
        routed = routed + 2.5 * scores[e] / sum(scores[c] for c in chosen) * (w["mixer.experts.down_proj"][e] @ inner)
    shared = (w["mixer.shared_experts.up_proj.weight"] @ x).clamp(min=0) ** 2
    return w["mixer.fc2_latent_proj.weight"] @ routed + w["mixer.shared_experts.down_proj.weight"] @ shared


@pytest.fixture(params=[("*E", 2), ("E", 3), ("*E*", 1)], ids=str)
def case(request: pytest.FixtureRequest) -> tuple[Any, str, int]:
    pattern, depth = request.param
    torch.manual_seed(3)
    model = generate(tiny_spec("ME*", mtp=pattern, depth=depth)).Model().eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "norm" in name:
                tensor.uniform_(0.5, 1.5)
    return model, pattern, depth


def test_logits(case: tuple[Any, str, int]) -> None:
    model, pattern, depth = case
    expected = second_form(model, pattern, depth, IDS)
    with torch.no_grad():
        got = model(IDS).mtp_logits
    assert [logits.shape for logits in got] == [(2, 9 - k, 97) for k in range(1, depth + 1)]
    for k, logits in enumerate(got, start=1):
        assert logits.abs().max() > 0.1
        assert (logits - expected[k - 1][:, : 9 - k]).abs().max() <= 1e-5


def test_logits_by_positions(case: tuple[Any, str, int]) -> None:
    model, pattern, depth = case
    with torch.no_grad():
        model.state_dict()["mtp.layers.0.hnorm.weight"].mul_(3)
        for name, tensor in model.state_dict().items():
            if name.endswith("e_score_correction_bias"):
                tensor.uniform_(-0.2, 0.2)
        got, (h, _) = model(IDS).mtp_logits, model.backbone(IDS)
        for b in range(2):
            expected = by_positions(model, pattern, depth, IDS[b].tolist(), h[b])
            for k in range(depth):
                assert (got[k][b] - torch.stack(expected[k])).abs().max() <= 1e-5


def test_loss(case: tuple[Any, str, int]) -> None:
    model, pattern, depth = case
    labels = IDS.clone()
    labels[1, 3:6] = -100
    with torch.no_grad():
        out = model(IDS, labels=labels)
    main = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    losses = []
    for k, logits in enumerate(second_form(model, pattern, depth, IDS), start=1):
        pairs = [(logits[b, t], labels[b, t + k + 1]) for b in range(2) for t in range(9 - k - 1)]
        scored = [F.cross_entropy(row, label) for row, label in pairs if label != -100]
        losses.append(torch.stack(scored).mean())
    mean = torch.stack(losses).mean()
    torch.testing.assert_close(out.mtp_loss, mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(out.loss, main + 0.3 * mean, atol=1e-5, rtol=0)


def test_every_parameter_learns(case: tuple[Any, str, int]) -> None:
    model, _, _ = case
    model(IDS, labels=IDS).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("length", [1, 2, 3])
def test_short_sequences(case: tuple[Any, str, int], length: int) -> None:
    """A depth that has no token to predict from adds nothing; the loss stays finite."""
    model, _, depth = case
    out = model(IDS[:, :length], labels=IDS[:, :length])
    assert len(out.mtp_logits) == min(depth, length - 1)
    assert torch.isfinite(out.loss) and torch.isfinite(out.mtp_loss)


@pytest.mark.parametrize(("length", "targets"), [(1, [0]), (2, [1, 0]), (3, [2, 1, 0]), (5, [4, 3, 2])])
def test_how_many_tokens_are_predicted(length: int, targets: list[int], tmp_path: Path) -> None:
    """By depth, as far as a sequence goes: two sequences, in one of which a label does not count."""
    write_generated(tiny_spec("M", mtp="*", depth=2), tmp_path)
    with imported(tmp_path) as train:
        labels = torch.ones(2, length, dtype=torch.int64)
        labels[1, -1] = train.trainer.IGNORED
        batch = SimpleNamespace(labels=labels, documents=None)
        trainer = SimpleNamespace(model=SimpleNamespace(config=train.model.Config()))
        found = train.trainer.Trainer.targets(trainer, batch)
        assert found.tolist() == [2 * count - (count > 0) for count in targets]
