"""Distributions: greedy, temperature, top-k, top-p, and what is drawn from them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from n3c.ir.diagnostics import ExitCode, N3CError
from n3c.runtime.generation.sampling import Sampling, distribution, draw

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
