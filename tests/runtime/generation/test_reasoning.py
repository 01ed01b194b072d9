"""The limit on reasoning: when the end tag is forced, by itself and under speculation."""

from __future__ import annotations

import numpy as np
import pytest

from n3c.runtime.generation.drafter import Drafter, MtpDrafter
from n3c.runtime.generation.limits import Room
from n3c.runtime.generation.loop import Generation
from n3c.runtime.generation.reasoning import Reasoning, Tags
from n3c.runtime.generation.sampling import Sampling
from n3c.runtime.generation.sequence import Options
from support.fake_engine import FakeEngine, Logits, table

START, END = (7,), (8, 9)
TAGS = Tags(START, END)


def forced_after(reasoning: Reasoning, tokens: list[int]) -> list[int | None]:
    """Feed tokens; return what is forced before each, and behind the last."""
    forced = [reasoning.next]
    for token in tokens:
        reasoning = reasoning.after(token)
        forced.append(reasoning.next)
    return forced


def test_the_end_tag_is_forced_after_the_budget() -> None:
    assert forced_after(Reasoning(TAGS, 2), [1, 7, 1, 2, 8, 9, 3, 3]) == [None] * 4 + [8, 9] + [None] * 3


def test_nothing_is_forced_outside_of_the_tags_or_when_they_close_in_time() -> None:
    assert forced_after(Reasoning(TAGS, 3), [1, 2, 3, 4, 5]) == [None] * 6
    assert forced_after(Reasoning(TAGS, 3), [7, 1, 8, 9, 4, 5, 6]) == [None] * 8


def test_an_end_tag_that_has_begun_is_completed_not_repeated() -> None:
    assert forced_after(Reasoning(TAGS, 2), [7, 1, 8])[-1] == 9


def test_budget_zero_closes_at_once_and_each_block_has_its_own() -> None:
    assert forced_after(Reasoning(TAGS, 0), [7, 8, 9, 1, 7]) == [None, 8, 9, None, None, 8]


def test_a_prompt_may_open_the_block() -> None:
    reasoning = Reasoning(TAGS, 2).begin([1, 7, 5, 5, 5])
    assert forced_after(reasoning, [1, 2]) == [None, None, 8]
    assert Reasoning(TAGS, 0).begin([7]).next == 8
    assert forced_after(Reasoning(TAGS, 1).begin([7, 1, 8, 9]), [1, 1, 1]) == [None] * 4


def thinking(size: int) -> Logits:
    """A model that opens its thinking at once and would never close it."""
    plain = table(size, seed=3)

    def model(tokens: list[int]) -> np.ndarray:
        logits = plain(tokens).copy()
        logits[list(START + END)] = -50
        if len(tokens) == 2:
            logits[7] = 50
        return logits

    return model  # type: ignore[return-value]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("drafter", [None, MtpDrafter()], ids=["plain", "mtp"])
def test_generation_obeys_it(drafter: Drafter | None, temperature: float) -> None:
    options = Options(max_new_tokens=14, sampling=Sampling(temperature), tags=TAGS, reasoning_budget=4)
    engine = FakeEngine(thinking(11), batch=2, draft_tokens=3)
    generation = Generation(engine, [[1, 2], [3, 4]], options, Room(64, 11), drafter=drafter)
    generation.run()
    for sequence in generation.sequences:
        assert sequence.new[0] == 7
        assert sequence.new[5:7] == [8, 9]
        assert not {7, 8, 9} & set(sequence.new[1:5] + sequence.new[7:])


def test_speculation_changes_nothing_of_greedy_output() -> None:
    options = Options(max_new_tokens=14, tags=TAGS, reasoning_budget=4)
    results: list[list[int]] = []
    for drafter in (None, MtpDrafter()):
        generation = Generation(FakeEngine(thinking(11)), [[1, 2]], options, Room(64, 11), drafter=drafter)
        generation.run()
        results.append(generation.sequences[0].new)
    assert results[0] == results[1]
