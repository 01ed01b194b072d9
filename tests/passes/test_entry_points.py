"""The entry points of serving give what the whole sequence gives, by the reference evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from n3c.ir.program import Program
from n3c.passes.base import run_pipeline
from n3c.passes.fuse_moe import FuseMoe
from n3c.passes.lower.model import lower
from n3c.passes.pipelines import quantize_pass
from n3c.passes.serving import serve
from n3c.runtime.engines.reference.evaluate import evaluate
from support.programs import load_parameters, random_tensors, save_tensors
from support.serving import Served
from support.specs import QUANTIZED, small_spec, weight_only

TOKENS, BATCH, CHUNK = 20, 2, 8
DRAFTED = 3


class Model:
    """One model: its training program and its served one, with parameters, and what the whole sequence gives."""

    def __init__(self, folder: Path, formats: str) -> None:
        spec = weight_only(small_spec(formats))
        checkpoint = save_tensors(random_tensors(lower(spec)), folder)
        plain = lower(spec)
        run_pipeline(plain, [quantize_pass(spec), FuseMoe()])
        self.program: Program = serve(spec).program
        self.parameters = load_parameters(self.program, checkpoint)
        generator = torch.Generator().manual_seed(3)
        self.ids = torch.randint(0, spec.model.vocab_size, (BATCH, TOKENS), generator=generator)
        result = evaluate(plain, "forward", {"input_ids": self.ids}, load_parameters(plain, checkpoint))
        self.logits, self.drafted = result.outputs[0], result.outputs[1]
        self.hidden, self.drafted_hidden = result.values["hidden"], result.values["mtp0.hidden"]

    def served(self) -> Served:
        return Served(self.program, self.parameters, BATCH)

    def at(self, lengths: Tensor, of: Tensor) -> Tensor:
        """Return of[b, lengths[b] - 1] as [B, 1, …]."""
        return of[torch.arange(BATCH), lengths - 1].unsqueeze(1)


@pytest.fixture(scope="module", params=["", QUANTIZED], ids=["bf16", "quantized"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("checkpoint"), request.param)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lengths", [[17, 17], [3, 17], [16, 8]], ids=str)
def test_prefill_in_chunks_then_decode(model: Model, lengths: list[int]) -> None:
    """Each sequence at its own length: some chunks are full, some partly, some empty for a sequence."""
    filled, served = torch.tensor(lengths), model.served()
    outputs = served.prefill(model.ids, filled, CHUNK)
    close(outputs["logits"], model.at(filled, model.logits))
    close(outputs["hidden"], model.at(filled, model.hidden))
    for _ in range(3):
        ids = model.ids[torch.arange(BATCH), filled].unsqueeze(1)
        outputs = served.call("decode", input_ids=ids, lengths=filled)
        filled = filled + 1
        close(outputs["logits"], model.at(filled, model.logits))


def test_padding_changes_nothing(model: Model) -> None:
    """Other padding gives the same bits, and a sequence without tokens keeps its states bit for bit."""
    results = []
    for padding in (0, 50):
        served = model.served()
        served.prefill(model.ids, torch.tensor([5, 7]), CHUNK)
        before = {name: state.clone() for name, state in served.states.items()}
        ids = torch.cat((model.ids[:, 5:8], torch.full((BATCH, CHUNK - 3), padding)), dim=1)
        inputs = {"counts": torch.tensor([3, 0]), "lengths": torch.tensor([5, 7])}
        outputs = served.call("prefill", input_ids=ids, following_ids=ids, **inputs)
        for name, state in served.states.items():
            assert torch.equal(state[1], before[name][1]), name
        assert any(not torch.equal(served.states[n][0], before[n][0]) for n in before)
        results.append({**served.states, "logits": outputs["logits"][:1]})
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("accepted", range(1, DRAFTED + 2))
def test_verify_after_every_acceptance_is_sequential_decoding(model: Model, accepted: int) -> None:
    """Drafts that are right as far as they are accepted, and wrong behind: the next call is as if they never were."""
    filled, served = torch.tensor([4, 9]), model.served()
    served.prefill(model.ids, filled, CHUNK)
    pending, rows = torch.zeros(BATCH, dtype=torch.int64), torch.arange(BATCH)
    for _ in range(2):
        places = filled[:, None] + torch.arange(DRAFTED + 1)
        ids = model.ids[rows[:, None], places]
        ids[:, accepted:] = (ids[:, accepted:] + 1) % 97
        following = torch.cat((ids[:, 1:], torch.zeros(BATCH, 1, dtype=torch.int64)), dim=1)
        outputs = served.call("verify", input_ids=ids, following_ids=following, lengths=filled, accepted=pending)
        for t in range(accepted):
            close(outputs["logits"][:, t : t + 1], model.at(filled + t + 1, model.logits))
            close(outputs["hidden"][:, t : t + 1], model.at(filled + t + 1, model.hidden))
        filled, pending = filled + accepted, torch.full((BATCH,), accepted)


def test_draft_is_the_prediction_step_of_the_model(model: Model) -> None:
    """Its cache comes from prefill and from verify, whose last entry had an unknown token and is written again."""
    filled, served = torch.tensor([5, 11]), model.served()
    outputs = served.prefill(model.ids, filled, CHUNK)
    rows = torch.arange(BATCH)
    hidden, pending = outputs["hidden"], torch.zeros(BATCH, dtype=torch.int64)
    for accepted in (2, 1, 4):
        newest = model.ids[rows, filled].unsqueeze(1)
        drafted = served.call("draft", input_ids=newest, hidden=hidden, lengths=filled - 1)
        close(drafted["logits"], model.at(filled, model.drafted))
        close(drafted["next_hidden"], model.at(filled, model.drafted_hidden))
        recursive = {"hidden": drafted["next_hidden"], "lengths": filled}
        served.call("draft", input_ids=newest, **recursive)  # writes a place that verify writes again
        ids = model.ids[rows[:, None], filled[:, None] + torch.arange(DRAFTED + 1)]
        ids[:, accepted:] = 0
        following = torch.cat((ids[:, 1:], torch.zeros(BATCH, 1, dtype=torch.int64)), dim=1)
        outputs = served.call("verify", input_ids=ids, following_ids=following, lengths=filled, accepted=pending)
        hidden, filled = outputs["hidden"][:, accepted - 1 : accepted], filled + accepted
        pending = torch.full_like(filled, accepted)


class Late(Served):
    """Serves with one state as it was a call earlier."""

    def __init__(self, model: Model, late: str) -> None:
        super().__init__(model.program, model.parameters, BATCH)
        self.late, self.before = late, self.states[late]

    def run(self, entry: str, inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        newest = self.states[self.late]
        self.states[self.late] = self.before
        outputs, states = super().run(entry, inputs)
        self.states[self.late] = newest
        if self.late in states:
            self.before = newest
        return outputs, states


def worst_of_rounds(model: Model, served: Served) -> float:
    """Prefill, three decoded tokens or two rounds of draft and verify, each against the whole sequence."""
    filled, rows, worst = torch.tensor([5, 9]), torch.arange(BATCH), 0.0

    def compare(actual: Tensor, expected: Tensor) -> None:
        nonlocal worst
        worst = max(worst, float((actual - expected).abs().max()))

    start = {name: state.clone() for name, state in served.states.items()}
    served.prefill(model.ids, filled, CHUNK)
    for t in range(2):
        outputs = served.call("decode", input_ids=model.ids[rows, filled + t].unsqueeze(1), lengths=filled + t)
        compare(outputs["logits"], model.at(filled + t + 1, model.logits))
    served.states = start
    outputs = served.prefill(model.ids, filled, CHUNK)
    hidden, pending = outputs["hidden"], torch.zeros(BATCH, dtype=torch.int64)
    for accepted in (2, 3, 1):
        newest = model.ids[rows, filled].unsqueeze(1)
        compare(
            served.call("draft", input_ids=newest, hidden=hidden, lengths=filled - 1)["logits"],
            model.at(filled, model.drafted),
        )
        ids = model.ids[rows[:, None], filled[:, None] + torch.arange(DRAFTED + 2)]
        inputs = {"input_ids": ids[:, :-1], "following_ids": ids[:, 1:]}
        outputs = served.call("verify", **inputs, lengths=filled, accepted=pending)
        compare(outputs["logits"][:, :1], model.at(filled + 1, model.logits))
        filled, pending = filled + accepted, torch.full_like(filled, accepted)
        hidden = outputs["hidden"][:, accepted - 1 : accepted]
    return worst


def test_a_state_read_one_call_late_is_seen(model: Model) -> None:
    """Every state counts: caches, windows, SSM states and pending operands, of the model and of the MTP block."""
    assert worst_of_rounds(model, model.served()) < 1e-5
    for name in model.program.states:
        assert worst_of_rounds(model, Late(model, name)) > 1e-4, name
