"""Packed documents: logits, losses and gradients are those of the documents run one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from .generated import generate, tiny_spec

# Chunks have 16 tokens: boundaries at their edges, inside them, and documents shorter than the convolution.
LENGTHS = ([16, 1, 2, 29], [7, 5, 20, 16])
DEPTH = 2


@pytest.fixture(scope="module", params=["*E", "M*"])
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(1)
    model = generate(tiny_spec(mtp=request.param, depth=DEPTH)).Model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("dt_bias"):
                parameter.uniform_(-6.0, 1.0)  # some states last for hundreds of tokens
    return model


def packed() -> tuple[Tensor, Tensor, list[list[Tensor]]]:
    """Return ids [B, S], document ids [B, S] that come back in no order, and each row's documents."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(97, (len(LENGTHS), sum(LENGTHS[0])), generator=generator)
    numbers = torch.tensor([5, 2, 5, -1])
    document_ids = torch.stack([numbers.repeat_interleave(torch.tensor(lengths)) for lengths in LENGTHS])
    return ids, document_ids, [list(row.split(lengths)) for row, lengths in zip(ids, LENGTHS, strict=True)]


def one_by_one(model: Any, documents: list[list[Tensor]]) -> tuple[list[list[Any]], Tensor]:
    """Return the output of each document, and the loss of the batch by its definition, token by token."""
    outputs = [[model(document[None]) for document in row] for row in documents]
    losses: list[list[Tensor]] = [[] for _ in range(DEPTH + 1)]  # by how many tokens lie between
    for row, found in zip(documents, outputs, strict=True):
        for document, out in zip(row, found, strict=True):
            for k, logits in enumerate((out.logits, *out.mtp_logits)):
                for t in range(len(document) - k - 1):
                    losses[k].append(F.cross_entropy(logits[0, t], document[t + k + 1]))
    main, *ahead = (torch.stack(tokens).mean() for tokens in losses)
    return outputs, main + 0.3 * torch.stack(ahead).mean()


def test_logits(model: Any) -> None:
    ids, document_ids, documents = packed()
    with torch.no_grad():
        out = model(ids, document_ids=document_ids)
        leaking = model(ids)
        outputs, _ = one_by_one(model, documents)
    for b, found in enumerate(outputs):
        expected = torch.cat([one.logits[0] for one in found])
        assert (out.logits[b] - expected).abs().max() <= 1e-5
        assert (leaking.logits[b] - expected)[LENGTHS[b][0] :].abs().max() > 1e-2  # the test can see a leak
        for k in range(1, DEPTH + 1):
            start = 0
            for length, one in zip(LENGTHS[b], found, strict=True):
                if length > k:
                    got = out.mtp_logits[k - 1][b, start : start + length - k]
                    assert (got - one.mtp_logits[k - 1][0]).abs().max() <= 1e-5
                start += length


def test_loss_and_gradients(model: Any) -> None:
    ids, document_ids, documents = packed()
    parameters = dict(model.named_parameters())
    _, expected = one_by_one(model, documents)
    loss = model(ids, ids, document_ids).loss
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    got = torch.autograd.grad(loss, list(parameters.values()))
    wanted = torch.autograd.grad(expected, list(parameters.values()))
    for name, a, b in zip(parameters, got, wanted, strict=True):
        assert (a - b).abs().max() <= 1e-5 * max(1.0, float(b.abs().max())), name


def test_nothing_of_one_document_reaches_another(model: Any) -> None:
    """Exactly, not just to 1e-5: other tokens in the document before change no bit of those after it."""
    ids, document_ids, _ = packed()
    changed = ids.clone()
    changed[:, :7] = (changed[:, :7] + 1) % 97
    with torch.no_grad():
        a, b = model(ids, document_ids=document_ids), model(changed, document_ids=document_ids)
    assert not torch.equal(a.logits[0, :16], b.logits[0, :16])
    assert torch.equal(a.logits[0, 16:], b.logits[0, 16:]) and torch.equal(a.logits[1, 7:], b.logits[1, 7:])


def test_labels_to_ignore_stay_ignored(model: Any) -> None:
    ids, document_ids, _ = packed()
    labels = ids.clone()
    labels[:, 4:] = -100
    out = model(ids, labels, document_ids)
    logits = out.logits[:, :3].flatten(0, 1)
    expected = F.cross_entropy(logits, ids[:, 1:4].flatten())
    torch.testing.assert_close(out.loss - 0.3 * out.mtp_loss, expected, atol=1e-5, rtol=0)


def test_one_document_is_a_sequence(model: Any) -> None:
    ids, _, _ = packed()
    with torch.no_grad():
        a, b = model(ids, ids, torch.full_like(ids, 9)), model(ids, ids)
    torch.testing.assert_close(a.logits, b.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(a.loss, b.loss, atol=1e-5, rtol=0)


def test_recurrence_of_documents() -> None:
    """The scan alone: documents shorter and longer than a chunk, in every place of it."""
    module = generate(tiny_spec("M", mtp=None))
    g = torch.Generator().manual_seed(0)
    x, dt = torch.randn(1, 23, 4, 3, generator=g), torch.rand(1, 23, 4, generator=g)
    A, state = -torch.tensor([0.01, 0.1, 1.0, 16.0]), torch.randn(1, 4, 3, 5, generator=g)
    B, C = torch.randn(2, 1, 23, 2, 5, generator=g).unbind(0)
    zeros = torch.zeros_like(state)
    for first in range(1, 21):
        documents = (torch.arange(23) >= first).int() + (torch.arange(23) >= first + 2).int()
        y, h = module.ssd.ssd(x, dt, A, B, C, state, 4, documents[None])
        parts, after = [], state
        for i, length in enumerate((first, 2, 21 - first)):
            place = slice(int((documents < i).sum()), int((documents < i).sum()) + length)
            args = (x[:, place], dt[:, place], A, B[:, place], C[:, place])
            part, after = module.ssd.ssd(*args, state if i == 0 else zeros, 4)
            parts.append(part)
        torch.testing.assert_close(y, torch.cat(parts, 1), atol=2e-6, rtol=2e-6)
        torch.testing.assert_close(h, after, atol=2e-6, rtol=2e-6)
