"""What every engine does, whatever runs it: `Model.step` of the generated code, the state plan and padding decide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from n3c.passes.lower.model import lower
from n3c.runtime.engines.choice import EngineName
from n3c.runtime.engines.interface import Array, call
from n3c.runtime.generation.capacity import Capacity
from n3c.runtime.generation.drafter import MtpDrafter
from support.programs import random_tensors, save_tensors
from support.small_engine import SmallModel, generated, small_model, states_of

ENGINES: tuple[EngineName, ...] = ("onnxruntime", "torch", "reference")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    return small_model(tmp_path_factory.mktemp("contract"))


@pytest.fixture(scope="module")
def module(small: SmallModel) -> Any:
    return small.module()


@pytest.fixture(params=ENGINES)
def name(request: pytest.FixtureRequest) -> EngineName:
    chosen: EngineName = request.param
    return chosen


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    state, tokens = model.allocate_state(1, 64), list[int]()
    logits = model.step(torch.tensor([prompt]), state)
    for _ in range(count):
        tokens.append(int(logits[0, -1].argmax()))
        logits = model.step(torch.tensor([tokens[-1:]]), state)
    return tokens


def test_greedy_generation_is_that_of_the_module(name: EngineName, small: SmallModel, module: Any) -> None:
    """Ragged prompts of several chunks, with drafts and without, up to the context length."""
    generator = np.random.default_rng(0)
    prompts = [generator.integers(0, 97, size).tolist() for size in (19, 1, 8)]
    engine, most = small.engine(name, 4), Capacity.of(small.spec).context_length
    expected = [greedy(module, prompt, min(24, most - len(prompt))) for prompt in prompts]
    for drafter in (None, MtpDrafter()):
        assert generated(engine, small.spec, prompts, 24, drafter) == expected


def test_the_engine_allocates_what_the_state_plan_says(name: EngineName, small: SmallModel) -> None:
    """All states of this spec are float32, as on a CPU."""
    held = small.engine(name, 3).allocated()
    assert held.states == 3 * sum(state.bytes for state in small.served.plan.states)
    assert held.weights > 0


def test_an_idle_sequence_keeps_its_state_bit_for_bit(name: EngineName, small: SmallModel) -> None:
    engine = small.engine(name, 2)
    ids = np.random.default_rng(1).integers(0, 97, (2, 8))

    def prefill(counts: list[int], lengths: list[int]) -> None:
        call(engine, "prefill", input_ids=ids, following_ids=ids, counts=np.array(counts), lengths=np.array(lengths))

    prefill([5, 8], [0, 0])
    before = states_of(engine)
    prefill([0, 8], [5, 8])
    after = states_of(engine)
    for state in after:
        np.testing.assert_array_equal(after[state][0], before[state][0])
    assert any((after[state][1] != before[state][1]).any() for state in after)


def test_a_sequence_is_reset_alone(name: EngineName, small: SmallModel) -> None:
    engine = small.engine(name, 3)
    ids = np.random.default_rng(4).integers(0, 97, (3, 8))
    counts, lengths = np.array([8, 5, 7]), np.zeros(3, np.int64)
    call(engine, "prefill", input_ids=ids, following_ids=ids, counts=counts, lengths=lengths)
    before = states_of(engine)
    engine.reset([1])
    for state, value in states_of(engine).items():
        assert not value[1].any()
        np.testing.assert_array_equal(value[[0, 2]], before[state][[0, 2]])
    assert any(value[1].any() for value in before.values())
    engine.reset()
    assert not any(value.any() for value in states_of(engine).values())


def prefilled(engine: Any, seed: int) -> None:
    """Give each row a prompt of its own length."""
    ids = np.random.default_rng(seed).integers(0, 97, (engine.batch, 8))
    counts = 3 + np.arange(engine.batch) % 5
    call(engine, "prefill", input_ids=ids, following_ids=ids, counts=counts, lengths=np.zeros(len(ids), np.int64))


def test_a_smaller_call_is_of_the_first_rows(name: EngineName, small: SmallModel) -> None:
    engine, alone = small.engine(name, 4, 2), small.engine(name, 2)
    assert (engine.batch, list(engine.batch_sizes)) == (4, [2, 4])
    ids = np.random.default_rng(6).integers(0, 97, (2, 8))
    counts, lengths = np.array([8, 5]), np.zeros(2, np.int64)
    for one in (engine, alone):
        call(one, "prefill", input_ids=ids, following_ids=ids, counts=counts, lengths=lengths)
    for tokens in (1, 2, 3):
        given = {"input_ids": ids[:, tokens : tokens + 1], "lengths": counts + tokens - 1}
        ours, theirs = (call(one, "decode", **given)["logits"] for one in (engine, alone))
        np.testing.assert_array_equal(ours, theirs)
    for state, value in states_of(alone).items():
        np.testing.assert_array_equal(states_of(engine)[state][:2], value)
    engine.reset([2, 3])
    ids, lengths = np.random.default_rng(6).integers(0, 97, (4, 1)), np.array([*(counts + 3), 0, 0])
    assert len(call(engine, "decode", input_ids=ids, lengths=lengths)["logits"]) == 4


@pytest.mark.parametrize("rows", [(1, 2), (2, 2)])
def test_a_copy_of_a_sequence_goes_on_in_any_row(name: EngineName, small: SmallModel, rows: tuple[int, int]) -> None:
    """Verifying and drafting from it give what the sequence itself would have given: in its own row, the same bits."""
    taken, given = rows
    engine = small.engine(name, 3)
    prefilled(engine, 7)
    tokens = 3 + taken
    copies = [engine.snapshot(taken, 0, 2), engine.snapshot(taken, 2, tokens)]
    assert all(copied.bytes > 0 for copied in copies)

    def continued(row: int) -> Array:
        """Return the logits of two verifications and a step of drafting, the other rows fed whatever comes."""
        ids = np.random.default_rng(8).integers(0, 97, (3, 3))
        ids[row] = [5, 6, 7]
        lengths, outputs = np.zeros(3, np.int64), list[Array]()
        for behind, accepted in ((tokens, 0), (tokens + 2, 2)):
            lengths[row] = behind
            given = {"input_ids": ids, "following_ids": ids, "lengths": lengths, "accepted": np.full(3, accepted)}
            outputs.append(call(engine, "verify", **given)["logits"][row])
        hidden = np.ones((3, 1, small.spec.model.hidden_size), np.float32)
        outputs.append(call(engine, "draft", input_ids=ids[:, :1], hidden=hidden, lengths=lengths)["logits"][row])
        return np.concatenate(outputs)

    expected = continued(taken)
    engine.reset()
    for copied in copies:
        engine.restore(given, copied)
    np.testing.assert_allclose(continued(given), expected, rtol=0, atol=0 if given == taken else 1e-5)


def test_a_copy_without_caches_leaves_those_of_the_row(name: EngineName, small: SmallModel) -> None:
    engine = small.engine(name, 2)
    prefilled(engine, 9)
    before, copied = states_of(engine), engine.snapshot(0, 0, 0)
    engine.reset([0])
    engine.restore(0, copied)
    for state, value in states_of(engine).items():
        expected = np.zeros_like(value[0]) if state.endswith("_cache") else before[state][0]
        np.testing.assert_array_equal(value[0], expected)
        np.testing.assert_array_equal(value[1], before[state][1])


def test_padding_changes_no_bit(name: EngineName, small: SmallModel) -> None:
    """Neither of a state nor of a result, also where it sticks out of the caches."""
    ids = np.random.default_rng(3).integers(0, 97, (1, 47))
    results: list[tuple[dict[str, Array], dict[str, Array]]] = []
    for padding in (0, 96):
        engine, outputs = small.engine(name, 1), dict[str, Array]()
        for start in range(0, 47, 8):
            tokens = ids[:, start : start + 8]
            padded = np.pad(tokens, ((0, 0), (0, 8 - tokens.shape[1])), constant_values=padding)
            counts, lengths = np.array([tokens.shape[1]]), np.array([start])
            outputs = call(engine, "prefill", input_ids=padded, following_ids=padded, counts=counts, lengths=lengths)
        results.append((outputs, states_of(engine)))
    for zeros, others in zip(*results, strict=True):
        for key, value in zeros.items():
            np.testing.assert_array_equal(value, others[key])


def test_a_state_read_one_token_late_changes_the_output(name: EngineName, small: SmallModel, module: Any) -> None:
    """`accepted` and `lengths` matter: each off by one gives other logits in the next verification."""
    ids = np.random.default_rng(2).integers(0, 97, (1, 9))

    def logits(accepted: int, length: int) -> Array:
        engine = small.engine(name, 1)
        for at, taken, behind in ((0, 0, 0), (3, accepted, length)):
            tokens = ids[:, at : at + 3]
            outputs = call(
                engine,
                "verify",
                input_ids=tokens,
                following_ids=np.pad(tokens[:, 1:], ((0, 0), (0, 1))),
                lengths=np.array([behind]),
                accepted=np.array([taken]),
            )
        return outputs["logits"]

    right = logits(3, 3)
    expected = module.step(torch.from_numpy(ids[:, :6]), module.allocate_state(1, 64)).numpy()[:, 3:]
    np.testing.assert_allclose(right, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    for accepted, length in ((2, 3), (3, 2), (2, 2)):
        assert np.abs(logits(accepted, length) - right).max() > 1e-2


def test_other_weights_in_the_same_engine(name: EngineName, small: SmallModel, tmp_path: Path) -> None:
    engine = small.engine(name, 1)

    def run(with_engine: Any) -> list[list[int]]:
        return generated(with_engine, small.spec, [[1, 2, 3]], 8, MtpDrafter())

    before = run(engine)
    other = save_tensors(random_tensors(lower(small.spec), seed=9), tmp_path)
    engine.replace_weights(other)
    assert run(engine) == run(small.engine(name, 1, checkpoint=other)) != before
    engine.replace_weights(small.checkpoint)
    assert run(engine) == before
