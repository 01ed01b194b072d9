"""The loss without logits: that of the logits, with equal gradients, and in less memory."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from .generated import generate, imported, tiny_spec, write_generated

TOKENS, WIDTH, VOCABULARY = 700, 24, 97  # three chunks, the last one short


@pytest.fixture(scope="module", params=["untied", "tied"])
def generated(request: pytest.FixtureRequest) -> Any:
    spec = tiny_spec()
    spec = replace(spec, model=replace(spec.model, tie_word_embeddings=request.param == "tied"))
    return generate(spec)


def operands(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Return x, weight and targets, of which some do not count."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(TOKENS, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    targets[::5] = -100
    return x, weight, targets


def gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(3.0 * loss, inputs)]


def test_against_cross_entropy(generated: Any) -> None:
    x, weight, targets = operands()
    got = gradients(generated.loss.linear_cross_entropy(x, weight, targets), x, weight)
    x, weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    expected = gradients(F.cross_entropy(x @ weight.T, targets, reduction="sum"), x, weight)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).abs().max() <= 2e-6 * b.abs().max()
    assert not got[1][::5].any()


@pytest.mark.parametrize("autocast", [True, False])
def test_in_bfloat16(generated: Any, autocast: bool) -> None:
    """As near to float32 as the way over logits, but for one rounding more; chunks are summed in float32."""
    x, weight, targets = operands(torch.float32 if autocast else torch.bfloat16)
    exact = [t.detach().float().requires_grad_() for t in (x, weight)]
    expected = gradients(F.cross_entropy(exact[0] @ exact[1].T, targets, reduction="sum"), *exact)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = gradients(generated.loss.linear_cross_entropy(x, weight, targets), x, weight)
        plain = gradients(F.cross_entropy(F.linear(x, weight).float(), targets, reduction="sum"), x, weight)
    assert got[0].dtype == torch.float32 and got[1].dtype == x.dtype and got[2].dtype == weight.dtype
    for a, p, e in zip(got, plain, expected, strict=True):
        assert 0 < (a.float() - e).norm() <= 1.25 * (p.float() - e).norm() + 1e-6 * e.norm()


def test_rows_of_some_tokens(generated: Any) -> None:
    """What processes with a part of the vocabulary each compute adds up to the whole."""
    x, weight, targets = operands()
    x, targets = x.detach()[:200].requires_grad_(), targets[:200]  # one chunk
    expected = gradients(generated.loss.linear_cross_entropy(x, weight, targets), x, weight)
    normaliser = (x @ weight.T).detach().logsumexp(-1, keepdim=True)

    def log_softmax(logits: Tensor) -> Tensor:
        return logits - normaliser

    total = x.new_zeros(())
    for part in torch.arange(VOCABULARY).split(40):
        rows, first = weight[part], int(part[0])
        total = total + generated.loss.linear_cross_entropy(x, rows, targets, first, log_softmax)
    for a, b in zip(gradients(total, x, weight), expected, strict=True):
        assert (a - b).abs().max() <= 2e-6 * b.abs().max()


def test_without_gradients(generated: Any) -> None:
    x, weight, targets = operands()
    expected = generated.loss.linear_cross_entropy(x, weight, targets)
    with torch.no_grad():
        loss = generated.loss.linear_cross_entropy(x, weight, targets)
    assert torch.equal(loss, expected) and not loss.requires_grad


def test_no_target_counts(generated: Any) -> None:
    x, weight, targets = operands()
    for result in gradients(generated.loss.linear_cross_entropy(x, weight, torch.full_like(targets, -100)), x, weight):
        assert not result.any()


@pytest.mark.parametrize("packed", [False, True])
def test_model_without_logits(generated: Any, packed: bool) -> None:
    torch.manual_seed(4)
    model = generated.Model()
    ids = torch.randint(97, (3, 120))  # more than one chunk
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.1, -100)
    documents = torch.arange(120).div(37, rounding_mode="floor").expand(3, -1) if packed else None
    results = []
    for return_logits in (True, False):
        model.zero_grad()
        out = model(ids, labels, documents, return_logits=return_logits)
        out.loss.backward()
        results.append((out, {name: weight.grad for name, weight in model.named_parameters()}))
    (whole, expected), (out, got) = results
    assert whole.logits.shape == (3, 120, 97) and len(whole.mtp_logits) == 2
    assert out.logits is None and out.mtp_logits == ()
    torch.testing.assert_close((out.loss, out.mtp_loss), (whole.loss, whole.mtp_loss), rtol=1e-6, atol=0)
    for name, gradient in expected.items():
        if gradient is not None:  # an expert's, if no token chose it
            assert (got[name] - gradient).abs().max() <= 2e-6 * gradient.abs().max().clamp(min=1e-3), name
    assert torch.equal(model(ids, return_logits=False).logits, model(ids).logits)  # there is nothing else to return


def test_head_with_other_numerics(tmp_path: Path) -> None:
    """A head that `emulate` has changed has no loss of its own: its logits are taken."""
    write_generated(tiny_spec(), tmp_path)
    with imported(tmp_path) as modules:
        torch.manual_seed(5)
        model = modules.model.Model()

        class Doubled(torch.nn.Linear):
            def forward(self, input: Tensor) -> Tensor:
                return 2 * super().forward(input)

        model.lm_head.__class__ = Doubled
        ids = torch.randint(97, (2, 30))
        expected = model(ids, ids).loss
        assert torch.equal(model(ids, ids, return_logits=False).loss, expected)
        model.lm_head.__class__ = modules.model.Head
        assert (model(ids, ids, return_logits=False).loss - expected).abs() > 1e-3


MEMORY = """
import sys
from pathlib import Path
import torch
from tiny_test.loss import linear_cross_entropy
import torch.nn.functional as F
x = torch.zeros(4096, 32, requires_grad=True)
weight = torch.zeros(16384, 32, requires_grad=True)
targets = torch.zeros(4096, dtype=torch.int64)

def resident(which):  # in KiB; the peak of getrusage is at least that of the process that started this one
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which + ":"))

before = resident("VmRSS")
if sys.argv[1] == "chunks":
    linear_cross_entropy(x, weight, targets).backward()
else:
    F.cross_entropy(F.linear(x, weight), targets).backward()
print(resident("VmHWM") - before)
"""


def test_memory(tmp_path: Path) -> None:
    """4,096 tokens of 16,384 logits are 268 MB; autograd holds them twice, the chunks an eighth of them."""
    write_generated(tiny_spec(), tmp_path)

    def peak(form: str) -> int:
        command = [sys.executable, "-c", MEMORY, form]
        # What is freed goes back at once, instead of staying with each thread: the peak is that of live tensors.
        exact = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"}
        done = subprocess.run(command, cwd=tmp_path, env=exact, check=True, capture_output=True, text=True)
        return 1024 * int(done.stdout)

    assert peak("chunks") < 80e6
    assert peak("logits") > 500e6  # the test can see them


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize(("label", "valid"), [(0, True), (96, True), (-100, True), (97, False), (-1, False)])
def test_labels_are_tokens(
    generated: Any, monkeypatch: pytest.MonkeyPatch, label: int, valid: bool, on_device: bool
) -> None:
    """Or ignored; on a GPU nothing waits for the answer."""
    labels, asserted = torch.tensor([[3, label, 5]]), list[bool]()

    def note(condition: Tensor, _: str) -> None:
        asserted.append(bool(condition))

    monkeypatch.setattr(torch, "_assert_async", note)
    monkeypatch.setattr(Tensor, "is_cuda", on_device)
    if valid or on_device:
        generated.loss.check_labels(labels, labels, 97)
    else:
        with pytest.raises(ValueError, match=rf"1 labels are neither -100 nor .* below 97: the first is {label}$"):
            generated.loss.check_labels(labels, labels, 97)
    assert asserted == ([valid] if on_device else [])


def test_a_loss_of_few_targets(generated: Any) -> None:
    """It is a mean over the targets: that of one is the loss of its token, and that of none is 0."""
    torch.manual_seed(4)
    model = generated.Model().eval()
    ids = torch.randint(97, (1, 6))
    labels = torch.full_like(ids, -100)
    assert model(ids, labels).loss.item() == 0
    labels[0, 3] = ids[0, 3]
    with torch.no_grad():
        out = model(ids, labels)
        expected = F.cross_entropy(model(ids).logits[0, 2], ids[0, 3])
    torch.testing.assert_close(out.losses[0], expected)
