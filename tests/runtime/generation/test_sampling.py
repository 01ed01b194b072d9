"""Distributions: greedy, temperature, top-k, top-p, and what is drawn from them."""

from __future__ import annotations

import math
from math import inf, nan

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from n3c.ir.diagnostics import ExitCode, N3CError
from n3c.runtime.engines.interface import Array
from n3c.runtime.generation.distribution import Distribution, certain
from n3c.runtime.generation.sampling import Sampling, distribution, likeliest, require_finite
from n3c.runtime.generation.sequence import Options

LOGITS = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32))


def probabilities(logits: Array, sampling: Sampling) -> NDArray[np.float64]:
    return distribution(logits, sampling).dense(len(logits))


def test_greedy_takes_the_first_of_equals() -> None:
    assert probabilities(np.array([1, 3, 3, 2], np.float32), Sampling()).tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
def test_temperature_sharpens_and_flattens(temperature: float) -> None:
    powers = np.array([0.1, 0.4, 0.2, 0.3]) ** (1 / temperature)
    assert probabilities(LOGITS, Sampling(temperature)) == pytest.approx(powers / powers.sum(), rel=1e-6)


def test_top_k_keeps_the_k_likeliest() -> None:
    assert probabilities(LOGITS, Sampling(1.0, top_k=2)) == pytest.approx([0, 4 / 7, 0, 3 / 7], rel=1e-6)
    assert probabilities(LOGITS, Sampling(1.0, top_k=9)) == pytest.approx([0.1, 0.4, 0.2, 0.3], rel=1e-6)


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    assert probabilities(LOGITS, Sampling(1.0, top_p=0.65)) == pytest.approx([0, 4 / 7, 0, 3 / 7], rel=1e-6)
    assert probabilities(LOGITS, Sampling(1.0, top_p=0.75)) == pytest.approx([0, 4 / 9, 2 / 9, 3 / 9], rel=1e-6)
    assert probabilities(LOGITS, Sampling(1.0, top_p=1e-9)).tolist() == [0, 1, 0, 0]


def test_the_bounds_of_top_k_and_top_p_are_exact() -> None:
    """Of equals the first are kept; a sum that is P is enough; K tokens of K are all."""
    equal = np.zeros(4, np.float32)
    assert probabilities(equal, Sampling(1.0, top_k=1)).tolist() == [1, 0, 0, 0]
    assert probabilities(equal, Sampling(1.0, top_k=3)).tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])
    assert probabilities(equal, Sampling(1.0, top_k=4)).tolist() == [0.25] * 4
    assert probabilities(equal, Sampling(1.0, top_p=0.5)).tolist() == [0.5, 0.5, 0, 0]
    assert probabilities(equal, Sampling(1.0, top_p=0.75)).tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])
    assert probabilities(equal, Sampling(1.0, top_p=1.0)).tolist() == [0.25] * 4
    assert probabilities(equal, Sampling(1.0, top_k=2, top_p=0.5)).tolist() == [1, 0, 0, 0]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-30])
def test_a_temperature_near_zero_is_greedy(temperature: float) -> None:
    assert probabilities(LOGITS, Sampling(temperature)).tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("bad", [nan, inf, -inf, -1, 2**63, 10**400])
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
    assert probabilities(LOGITS, Sampling(1.0, top_k=2, top_p=0.5)).tolist() == [0, 1, 0, 0]


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
    drawn_from = distribution(np.array(logits, np.float32), Sampling(temperature, top_k, top_p))
    assert drawn_from.probabilities.sum() == pytest.approx(1)
    assert drawn_from.probabilities.min() >= 0
    assert drawn_from.probability(drawn_from.draw(np.random.default_rng(seed))) > 0


def test_the_end_of_the_distribution_is_never_passed() -> None:
    """A random number of almost 1 with rounding upwards must not give the token of weight 0 at the end."""

    class Last:
        def random(self) -> float:
            return 1.0

    end = np.array([0.0, 0.3, 0.7, 0.0])
    assert Distribution(None, end).draw(Last()) == 2  # type: ignore[arg-type]
    long = np.concatenate([end, np.zeros(3000)])
    assert Distribution(None, long).draw(Last()) == 2  # type: ignore[arg-type]
    assert Distribution(np.array([5, 6, 8, 9]), end).draw(Last()) == 8  # type: ignore[arg-type]


def plain(logits: Array, sampling: Sampling) -> NDArray[np.float64]:
    """The definition, by a stable sort of the whole vocabulary in float64."""
    scaled = (logits - logits.max()).astype(np.float64) / sampling.temperature
    weights = np.exp(scaled)
    order = np.argsort(-logits, kind="stable")
    kept = order[: sampling.top_k] if sampling.top_k else order
    mass = np.cumsum(weights[kept])
    kept = kept[: int(np.count_nonzero(mass < sampling.top_p * mass[-1])) + 1] if sampling.top_p < 1 else kept
    cut = np.zeros_like(weights)
    cut[kept] = weights[kept]
    return np.asarray(cut / cut.sum())


@pytest.mark.parametrize("vocabulary", [70, 4096, 5001, 40_000])
@pytest.mark.parametrize("spread", [0.5, 3.0, 12.0])
@pytest.mark.parametrize("levels", [None, 7])
@pytest.mark.parametrize(
    "sampling",
    [Sampling(1.0), Sampling(0.7, top_k=50), Sampling(1.3, top_p=0.83), Sampling(0.9, top_k=3000, top_p=0.61)],
    ids=["all", "top-k", "top-p", "both"],
)
def test_partial_selection_keeps_what_a_whole_sort_keeps(
    vocabulary: int, spread: float, levels: int | None, sampling: Sampling
) -> None:
    """Peaked and flat, with many equal logits (`levels`) too: the first of equals are kept."""
    random = np.random.default_rng(vocabulary)
    logits = (random.standard_normal(vocabulary) * spread).astype(np.float32)
    if levels is not None:
        logits = (np.round(logits * levels / spread / 4) * spread / levels).astype(np.float32)
    expected = plain(logits, sampling)
    found = probabilities(logits, sampling)
    assert np.flatnonzero(found).tolist() == np.flatnonzero(expected).tolist()
    assert found == pytest.approx(expected, rel=2e-5, abs=1e-12)


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=400), st.integers(1, 420))
def test_the_likeliest_are_the_first_of_a_stable_sort(values: list[int], count: int) -> None:
    logits = np.array(values, np.float32)
    expected = np.sort(np.argsort(-logits, kind="stable")[:count])
    assert likeliest(logits, count).tolist() == expected.tolist()


@pytest.mark.parametrize("tokens", [None, np.arange(0, 3000, 2)], ids=["all", "some"])
def test_draws_have_the_probabilities(tokens: NDArray[np.int64] | None) -> None:
    """Pearson's chi-square of 40,000 draws over blocks of unequal weight: 63 degrees of freedom exceed 103 one time in
    a thousand.
    """
    size = 1500
    weights = np.repeat([1.0, 5.0, 0.0, 2.0], size // 4) * np.linspace(0.5, 1.5, size)
    drawn_from = Distribution(tokens, weights / weights.sum())
    generator = np.random.default_rng(3)
    drawn = np.array([drawn_from.draw(generator) for _ in range(40_000)])
    cells = np.array_split(drawn_from.dense(3000 if tokens is not None else size), 64)
    expected = np.array([cell.sum() for cell in cells]) * len(drawn)
    edges = np.cumsum([0, *(len(cell) for cell in cells)])
    counts = np.histogram(drawn, edges)[0]
    assert not counts[expected == 0].any()
    some = expected > 0
    assert float(((counts[some] - expected[some]) ** 2 / expected[some]).sum()) < 103


@pytest.mark.parametrize("tokens", [np.array([3]), np.array([3, 7]), None], ids=["one", "two", "all"])
def test_a_draw_takes_one_random_number(tokens: NDArray[np.int64] | None) -> None:
    """Also where there is nothing to choose: what comes after does not depend on it."""
    generator, other = np.random.default_rng(1), np.random.default_rng(1)
    drawn = Distribution(tokens, np.ones(3 if tokens is None else len(tokens))).draw(generator)
    assert drawn in ((0, 1, 2) if tokens is None else tokens)
    other.random()
    assert generator.random() == other.random()


@pytest.mark.parametrize(("number", "token"), [(0.0, 0), (0.49, 0), (0.5, 1), (0.74, 1), (0.75, 600), (0.99, 600)])
def test_a_draw_is_where_the_running_sum_passes_the_number(number: float, token: int) -> None:
    """Over several blocks, whose last one is not full."""

    class Fixed:
        def random(self) -> float:
            return number

    weights = np.zeros(700)
    weights[[0, 1, 600]] = 2, 1, 1
    assert Distribution(None, weights).draw(Fixed()) == token  # type: ignore[arg-type]


SPARSE = Distribution(np.array([1, 4, 6]), np.array([0.5, 0.2, 0.3]))
DENSE = Distribution(None, np.array([0.1, 0.2, 0.1, 0.1, 0.3, 0.1, 0.1, 0.0]))


@pytest.mark.parametrize("p", [SPARSE, DENSE, certain(4)])
@pytest.mark.parametrize("q", [SPARSE, DENSE, certain(4), certain(0), certain(7)])
def test_what_exceeds_is_the_difference(p: Distribution, q: Distribution) -> None:
    expected = np.maximum(p.dense(8) - q.dense(8), 0)
    found = p.excess(q)
    assert (np.zeros(8) if found is None else found.dense(8)).tolist() == pytest.approx(expected.tolist())
    assert [p.probability(token) for token in range(8)] == p.dense(8).tolist()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(N3CError, match="E0806") as error:
        require_finite(np.array([0.0, bad], np.float32))
    assert error.value.exit_code == ExitCode.NUMERICS


@pytest.mark.parametrize("size", [1, 7, 8, 4099])
def test_probabilities_of_many_tokens_sum_to_one(size: int) -> None:
    logits = np.random.default_rng(size).standard_normal(size, np.float32)
    exact = np.exp(logits.astype(np.float64))
    found = distribution(logits, Sampling(1.0)).dense(size)
    assert math.fsum(found) == pytest.approx(1, abs=2**-21)
    assert found == pytest.approx(exact / exact.sum(), rel=2**-20)
