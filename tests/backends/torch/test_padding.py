"""Padded batches: tokens give what they give without the padding, wherever it is, and experts see no other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from .generated import generate, tiny_spec

LENGTH = 21
IDS = torch.randint(97, (3, LENGTH), generator=torch.Generator().manual_seed(5))
MASKS = {
    "right": ([1] * 21, [1] * 12 + [0] * 9, [1] * 20 + [0]),
    "left": ([0] * 5 + [1] * 16, [1] * 21, [0] + [1] * 20),
    "holes": ([1] * 4 + [0] * 3 + [1] * 14, [0, 1] * 10 + [1], [0] * 2 + [1] * 9 + [0] * 10),
}


@pytest.fixture(scope="module")
def package() -> Any:
    return generate(tiny_spec("MEM*E"))


@pytest.fixture
def model(package: Any) -> Any:
    torch.manual_seed(0)
    model = package.Model()
    for router in model.routers():
        torch.nn.init.uniform_(router.e_score_correction_bias, -0.2, 0.2)
    return model


def alone(model: Any, mask: Tensor) -> list[Any]:
    """Return what the model gives for the tokens of each row, without the others."""
    rows = [ids[kept][None] for ids, kept in zip(IDS, mask.bool(), strict=True)]
    return [model(row, row) for row in rows]


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("return_logits", [True, False])
def test_rows_give_what_they_give_alone(model: Any, kind: str, return_logits: bool) -> None:
    """Logits, losses, loads, the balance loss, and the gradient of every parameter."""
    mask = torch.tensor(MASKS[kind])
    expected = alone(model, mask)
    out = model(IDS, IDS, attention_mask=mask, return_logits=return_logits)
    if return_logits:
        for row, kept, one in zip(out.logits, mask.bool(), expected, strict=True):
            torch.testing.assert_close(row[kept], one.logits[0], atol=1e-5, rtol=0)
    for k, loss in enumerate(out.losses, start=1):
        share = torch.tensor([kept.sum() - k for kept in mask]).float()
        means = torch.stack([one.losses[k - 1] for one in expected])
        torch.testing.assert_close(loss, (share * means).sum() / share.sum(), atol=1e-6, rtol=1e-6)
    assert torch.equal(out.tokens_per_expert, torch.stack([one.tokens_per_expert for one in expected]).sum(0))
    torch.testing.assert_close(out.balance_loss, torch.stack([one.balance_loss for one in expected]).mean())

    (out.losses[0] + out.balance_loss).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    share = (mask.sum(1) - 1) / (mask.sum(1) - 1).sum()
    losses = [part * one.losses[0] + one.balance_loss / 3 for part, one in zip(share, expected, strict=True)]
    torch.stack(losses).sum().backward()
    for name, parameter in model.named_parameters():
        if name in found and parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, atol=2e-5, rtol=1e-4, msg=name)


def test_padding_reaches_no_expert(model: Any) -> None:
    """As many rows as there are tokens, at each depth of MTP, too; and no gradient comes from the others."""
    rows: list[int] = []

    def count(_: Any, inputs: tuple[Tensor, ...]) -> None:
        rows.append(inputs[0].shape[:2].numel())

    for module in model.modules():
        if type(module).__name__ == "Experts":
            module.register_forward_pre_hook(count)
    mask = torch.tensor(MASKS["right"])
    model(IDS, IDS, attention_mask=mask)
    tokens = int(mask.sum())
    assert rows == [tokens, tokens, tokens - 3, tokens - 6]


def test_what_padding_holds_does_not_matter(model: Any) -> None:
    mask = torch.tensor(MASKS["holes"])
    other = torch.where(mask.bool(), IDS, (IDS + 1) % 97)
    first, second = (model(ids, ids, attention_mask=mask, return_logits=False) for ids in (IDS, other))
    assert torch.equal(first.loss, second.loss) and torch.equal(first.balance_loss, second.balance_loss)


def test_documents_and_padding(model: Any) -> None:
    documents = (torch.arange(LENGTH) >= 9).long().expand(3, -1)
    mask = torch.tensor(MASKS["left"])
    kept = mask[0].bool()
    expected = model(IDS[:1, kept], IDS[:1, kept], documents[:1, kept])
    out = model(IDS[:1], IDS[:1], documents[:1], attention_mask=mask[:1])
    torch.testing.assert_close(out.logits[0, kept], expected.logits[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(out.loss, expected.loss)


def test_a_mask_of_ones_and_padding_on_the_right_move_nothing(package: Any) -> None:
    padding = package.sequences
    assert padding.tokens_first(torch.ones(2, 5)) == (None, None)
    order, found = padding.tokens_first(torch.tensor([[1, 1, 0], [1, 1, 1]]))
    assert order is None and found.places.tolist() == [0, 1, 3, 4, 5]


def test_nothing_but_padding(model: Any) -> None:
    out = model(IDS, IDS, attention_mask=torch.zeros_like(IDS))
    assert out.loss == 0 and out.tokens_per_expert.sum() == 0


@pytest.mark.parametrize("label", [97, -1, -99])
@pytest.mark.parametrize("return_logits", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_labels_that_are_no_token_are_an_error(label: int, return_logits: bool, tied: bool) -> None:
    spec = tiny_spec("M*", mtp=None)
    model = generate(replace(spec, model=replace(spec.model, tie_word_embeddings=tied))).Model()
    labels = IDS.clone()
    labels[1, 7] = label
    with pytest.raises(ValueError, match=f"1 labels are neither -100 nor a token below 97: the first is {label}"):
        model(IDS, labels, return_logits=return_logits)
    labels[1, 7] = -100
    model(IDS, labels, return_logits=return_logits)


@pytest.mark.parametrize("return_logits", [True, False])
def test_what_is_said_of_tokens_has_their_shape(return_logits: bool) -> None:
    model = generate(tiny_spec("M*E", mtp=None)).Model()
    for option in ("labels", "attention_mask", "document_ids", "routed_experts"):
        name = option.replace("document_", "document ")
        for wrong in (IDS[:, :-1], IDS[:1], IDS.flatten()):
            with pytest.raises(ValueError, match=f"the shape of {name} is .*, where the tokens have"):
                model(IDS, **{option: wrong}, return_logits=return_logits)
    for dtype in (torch.float32, torch.int32, torch.uint8, torch.bool):
        with pytest.raises(ValueError, match=f"labels are {dtype}, and not torch.int64"):
            model(IDS, IDS.to(dtype), return_logits=return_logits)
