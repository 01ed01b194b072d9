"""Distributions: greedy, temperature, top-k, top-p, and what is drawn from them."""

from __future__ import annotations

from math import inf, nan

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from n3c.ir.diagnostics import ExitCode, N3CError
from n3c.runtime.generation.sampling import Sampling, distribution, draw
from n3c.runtime.generation.sequence import Options

LOGITS = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32))


def test_greedy_takes_the_first_of_equals() -> None:
    assert distribution(np.array([1, 3, 3, 2], np.float32), Sampling()).tolist() == [0, 1, 0, 0]


def test_temperature_sharpens_and_flattens() -> None:
    assert distribution(LOGITS, Sampling(1.0)) == pytest.approx([0.1, 0.4, 0.2, 0.3], rel=1e-6)
    squares = np.array([0.01, 0.16, 0.04, 0.09])
    assert distribution(LOGITS, Sampling(0.5)) == pytest.approx(squares / squares.sum(), rel=1e-6)


def test_top_k_keeps_the_k_likeliest() -> None:
    assert distribution(LOGITS, Sampling(1.0, top_k=2)) == pytest.approx([0, 4 / 7, 0, 3 / 7], rel=1e-6)
    assert distribution(LOGITS, Sampling(1.0, top_k=9)) == pytest.approx([0.1, 0.4, 0.2, 0.3], rel=1e-6)


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    assert distribution(LOGITS, Sampling(1.0, top_p=0.65)) == pytest.approx([0, 4 / 7, 0, 3 / 7], rel=1e-6)
    assert distribution(LOGITS, Sampling(1.0, top_p=0.75)) == pytest.approx([0, 4 / 9, 2 / 9, 3 / 9], rel=1e-6)
    assert distribution(LOGITS, Sampling(1.0, top_p=1e-9)).tolist() == [0, 1, 0, 0]


def test_the_bounds_of_top_k_and_top_p_are_exact() -> None:
    """Of equals the first are kept; a sum that is P is enough; K tokens of K are all."""
    equal = np.zeros(4, np.float32)
    assert distribution(equal, Sampling(1.0, top_k=1)).tolist() == [1, 0, 0, 0]
    assert distribution(equal, Sampling(1.0, top_k=3)).tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])
    assert distribution(equal, Sampling(1.0, top_k=4)).tolist() == [0.25] * 4
    assert distribution(equal, Sampling(1.0, top_p=0.5)).tolist() == [0.5, 0.5, 0, 0]
    assert distribution(equal, Sampling(1.0, top_p=0.75)).tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])
    assert distribution(equal, Sampling(1.0, top_p=1.0)).tolist() == [0.25] * 4
    assert distribution(equal, Sampling(1.0, top_k=2, top_p=0.5)).tolist() == [1, 0, 0, 0]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-30])
def test_a_temperature_near_zero_is_greedy(temperature: float) -> None:
    assert distribution(LOGITS, Sampling(temperature)).tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("bad", [nan, inf, -inf, -1, 2**63])
@pytest.mark.parametrize("name", ["top_k", "top_p", "seed"])
def test_numbers_out_of_their_range(name: str, bad: float) -> None:
    with pytest.raises(N3CError, match=f"E0816.*`{name}`") as error:
        Sampling(**{name: bad})  # type: ignore[arg-type]
    assert error.value.exit_code == ExitCode.USAGE


@pytest.mark.parametrize("bad", [nan, inf, -1e-9])
def test_a_temperature_is_finite_and_not_negative(bad: float) -> None:
    with pytest.raises(N3CError, match=r"E0816.*`temperature`"):
        Sampling(bad)


def test_top_p_is_above_zero() -> None:
    with pytest.raises(N3CError, match="not more than 0"):
        Sampling(top_p=0)


@pytest.mark.parametrize("bad", [nan, -1, 2**63])
@pytest.mark.parametrize("name", ["max_new_tokens", "reasoning_budget"])
def test_lengths_out_of_their_range(name: str, bad: float) -> None:
    with pytest.raises(N3CError, match=f"E0816.*`{name}`"):
        Options(**{name: bad})  # type: ignore[arg-type]


def test_top_p_counts_what_top_k_left() -> None:
    """0.4 / 0.7 of what is left is above one half: one token is enough."""
    assert distribution(LOGITS, Sampling(1.0, top_k=2, top_p=0.5)).tolist() == [0, 1, 0, 0]


@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=9),
    st.floats(0.01, 100),
    st.integers(0, 9),
    st.floats(0.01, 1.0),
    st.integers(0, 99),
)
def test_every_distribution_is_one_and_draws_come_from_it(
    logits: list[float], temperature: float, top_k: int, top_p: float, seed: int
) -> None:
    probabilities = distribution(np.array(logits, np.float32), Sampling(temperature, top_k, top_p))
    assert probabilities.sum() == pytest.approx(1)
    assert probabilities.min() >= 0
    assert probabilities[draw(probabilities, np.random.default_rng(seed))] > 0


def test_the_end_of_the_distribution_is_never_passed() -> None:
    """A random number of almost 1 with rounding upwards must not give the token of weight 0 at the end."""

    class Last:
        def random(self) -> float:
            return 1.0

    assert draw(np.array([0.0, 0.3, 0.7, 0.0]), Last()) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(N3CError, match="E0806") as error:
        distribution(np.array([0.0, bad], np.float32), Sampling())
    assert error.value.exit_code == ExitCode.NUMERICS
