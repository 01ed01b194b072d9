"""Stages: balanced by bytes, and chained they are the single plan, exactly, at every entry point."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from n3c.backends.onnx.stages import balanced, layer_bytes, stages
from n3c.ir.program import EntryPoint
from n3c.passes.lower.model import lower
from n3c.passes.serving import serve
from support.programs import random_tensors, save_tensors
from support.serving import RuntimeServed
from support.specs import QUANTIZED, small_spec

BATCH, STARTS = 2, (0, 3, 5)


def worst(sizes: list[int], starts: tuple[int, ...]) -> int:
    return max(sum(sizes[a:b]) for a, b in zip(starts, [*starts[1:], len(sizes)], strict=True))


@given(st.lists(st.integers(0, 50), min_size=1, max_size=9), st.data())
def test_the_largest_stage_is_as_small_as_can_be(sizes: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(sizes)))
    starts = balanced(sizes, count)
    assert len(starts) == count and starts[0] == 0 and list(starts) == sorted(set(starts)) and starts[-1] < len(sizes)
    best = min(worst(sizes, (0, *cuts)) for cuts in combinations(range(1, len(sizes)), count - 1))
    assert worst(sizes, starts) == best


def test_the_bytes_of_layers() -> None:
    """All weights and states are counted once: of the embedding with the first layer, of all behind them the last."""
    program = serve(small_spec(QUANTIZED)).program
    layers = max(memory.layer for memory in program.parameters.values() if memory.layer is not None) + 1
    for count in (1, 2, layers):
        sizes = [0] * count
        tokens = program.entry_points["verify"].tokens
        for memory in program.parameters.values():
            first = memory.role == "embedding"
            layer = (0 if first else count - 1) if memory.layer is None else min(memory.layer, count - 1)
            sizes[layer] += memory.type.bytes
        for state in program.states.values():
            size = state.type.bind({"B": BATCH, "S": tokens}).bytes
            sizes[state.layer if state.layer < count else count - 1] += size
        assert layer_bytes(program, count, BATCH) == sizes


def test_more_stages_than_layers() -> None:
    with pytest.raises(ValueError, match="3 layers do not make 4 stages"):
        balanced([1, 2, 3], 4)


def test_bytes_are_all_that_a_gpu_must_hold() -> None:
    """Weights once, though prefill and decode bind the experts as different types; states of the whole batch."""
    spec = small_spec(QUANTIZED)
    served = serve(spec)
    one, two = (layer_bytes(served.program, len(spec.model.pattern), batch) for batch in (1, 2))
    weights = sum(entry.bytes for entry in served.program.ledger)
    states = sum(state.bytes for state in served.plan.states)
    assert sum(two) - sum(one) == states
    assert sum(one) == pytest.approx(weights + states, rel=0.01)  # besides the ledger: A, D and the like


def chained(served: RuntimeServed, entry: EntryPoint, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Run the stages of `entry` one after the other: what one returns are inputs of the next."""
    known = {**inputs, **served.states}
    for stage, part in stages(served.program, entry, STARTS):
        name = f"{entry.name}.stage{stage}"
        served.program.entry_points[name] = replace(part, name=name)
        outputs, states = served.run(name, {value: known[value] for value in part.inputs})
        known |= outputs
        served.states |= states
    return known


def test_chained_stages_are_the_whole_at_every_entry_point(tmp_path: Path) -> None:
    spec = small_spec(
        QUANTIZED + "\n", odd=("max_seq_len = 32", "max_seq_len = 32\nprefill_chunk = 8\ndraft_tokens = 2")
    )
    checkpoint = save_tensors(random_tensors(lower(spec)), tmp_path)
    whole, parts = (RuntimeServed(serve(spec).program, checkpoint, BATCH) for _ in range(2))
    ids = torch.randint(0, 97, (BATCH, 8), generator=torch.Generator().manual_seed(2))
    lengths = torch.tensor([5, 8])
    three, one = torch.tensor([[3, 4, 5], [6, 7, 8]]), torch.tensor([[1], [2]])
    hidden = torch.randn(BATCH, 1, 64, generator=torch.Generator().manual_seed(3))
    calls: list[tuple[str, dict[str, Tensor]]] = [
        ("prefill", {"input_ids": ids, "following_ids": ids.roll(-1, 1), "counts": lengths, "lengths": lengths * 0}),
        ("draft", {"input_ids": one, "hidden": hidden, "lengths": lengths}),
        ("verify", {"input_ids": three, "following_ids": three, "lengths": lengths, "accepted": lengths * 0}),
        ("verify", {"input_ids": three, "following_ids": three, "lengths": lengths + 2, "accepted": lengths * 0 + 2}),
        ("decode", {"input_ids": one, "lengths": lengths + 4}),
    ]
    for entry, inputs in calls:
        inputs["key_positions"] = torch.arange(20)
        expected = whole.call(entry, **inputs)
        found = chained(parts, whole.program.entry_points[entry], inputs)
        for name, value in expected.items():
            assert torch.equal(found[name], value), (entry, name)
        assert all(torch.equal(parts.states[name], state) for name, state in whole.states.items()), entry
    last = [stage for stage, _ in stages(whole.program, whole.program.entry_points["draft"], STARTS)]
    assert last == [2]  # where the drafter's weights are
