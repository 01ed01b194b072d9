"""torch.export and torch.compile of a generated model: whole graphs, the numbers of the eager form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from .generated import generate, tiny_spec

IDS = torch.randint(97, (2, 20), generator=torch.Generator().manual_seed(4))
DOCUMENTS = (torch.arange(20) >= 7).long().expand(2, -1)


@pytest.fixture(scope="module")
def module() -> Any:
    return generate(tiny_spec("ME*-", mtp="*E", n_group=2))


@pytest.fixture
def model(module: Any) -> Any:
    torch.manual_seed(2)
    return module.Model().eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_export_of_forward(model: Any, dtype: torch.dtype) -> None:
    """Grouped GEMM has no tracing rule in float32: there the traced form is another, with the same numbers."""
    model.to(dtype)
    exported = torch.export.export(model, (IDS, IDS, DOCUMENTS), strict=False).module()
    with torch.no_grad():
        expected, got = model(IDS, IDS, DOCUMENTS), exported(IDS, IDS, DOCUMENTS)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    for a, b in zip(
        (got.logits, got.loss, *got.mtp_logits), (expected.logits, expected.loss, *expected.mtp_logits), strict=True
    ):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def test_export_of_any_length(model: Any) -> None:
    """One graph for any batch, and for any length of more than a chunk, with labels."""
    batch, length = torch.export.Dim("batch", max=8), torch.export.Dim("length", min=17, max=512)
    shapes = {"input_ids": {0: batch, 1: length}, "labels": {0: batch, 1: length}}
    exported = torch.export.export(model, (IDS, IDS), dynamic_shapes=shapes, strict=False).module()
    for rows, tokens in ((1, 17), (3, 64), (2, 77)):
        ids = torch.randint(97, (rows, tokens), generator=torch.Generator().manual_seed(tokens))
        with torch.no_grad():
            expected, got = model(ids, ids), exported(ids, ids)
        torch.testing.assert_close(got.logits, expected.logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got.loss, expected.loss, atol=1e-5, rtol=1e-5)


def test_export_of_any_length_for_a_batch_of_one_size(model: Any) -> None:
    """PyTorch cannot prove what it would have to of a named length: it is left to the run."""
    shapes = {"input_ids": {1: torch.export.Dim.DYNAMIC}}
    exported = torch.export.export(model, (IDS,), dynamic_shapes=shapes, strict=False).module()
    ids = torch.randint(97, (2, 133), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(exported(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)


class Decode(nn.Module):
    """`Model.step` without side effects: the state's tensors go in and come out, as an exported graph needs it.

    The step reads the whole cache, whatever it holds: `lengths` says what of it is there.
    """

    def __init__(self, module: Any, model: Any, max_seq_len: int) -> None:
        super().__init__()
        self.module, self.model, self.max_seq_len = module, model, max_seq_len

    def forward(self, input_ids: Tensor, lengths: Tensor, tensors: dict[str, list[Tensor]]) -> Any:
        empty = self.model.allocate_state(1, 1)
        fields = {n: dict(zip(getattr(empty, n), (t.clone() for t in ts), strict=True)) for n, ts in tensors.items()}
        longest = self.max_seq_len - input_ids.shape[1]
        state = self.module.State(lengths.clone(), self.max_seq_len, longest, **fields)
        logits = self.model.step(input_ids, state)
        return logits, state.lengths, {name: list(values.values()) for name, values in fields.items()}


def test_export_of_step(module: Any, model: Any) -> None:
    """One graph decodes any batch from any place."""
    room = 12
    decode = Decode(module, model, room)

    def inputs(batch: int) -> tuple[Tensor, Tensor, dict[str, list[Tensor]]]:
        state = model.allocate_state(batch, room)
        tensors = {name: list(getattr(state, name).values()) for name in ("conv", "ssm", "keys", "values")}
        return torch.zeros(batch, 1, dtype=torch.int64), state.lengths, tensors

    example = inputs(3)
    batch = {0: torch.export.Dim("batch")}
    shapes = (batch, batch, {name: [batch] * len(ts) for name, ts in example[2].items()})
    exported = torch.export.export(decode, example, dynamic_shapes=shapes, strict=False).module()
    _, lengths, tensors = inputs(2)
    state = model.allocate_state(2, room)
    for t in range(8):
        logits, lengths, tensors = exported(IDS[:, t : t + 1], lengths, tensors)
        torch.testing.assert_close(logits, model.step(IDS[:, t : t + 1], state), atol=1e-5, rtol=1e-5)
    assert lengths.tolist() == [8, 8]


def trained_step(model: Any, forward: Any) -> list[Tensor]:
    model.zero_grad()
    out = forward(IDS, IDS, DOCUMENTS)
    (out.loss + 0.01 * out.balance_loss).backward()
    return [out.loss.detach(), out.tokens_per_expert, *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile(backend: str) -> None:
    """One graph without breaks, forward and backward, with the loads of the routers."""
    torch.manual_seed(2)
    model = generate(tiny_spec("ME*", mtp="E", depth=1)).Model()
    expected = trained_step(model, model)
    got = trained_step(model, torch.compile(model, fullgraph=True, backend=backend))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
