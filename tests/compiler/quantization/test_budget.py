"""The choice under a budget, against trying everything."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from n3c.compiler.quantization.search.budget import choose, mean_bits
from n3c.compiler.quantization.search.noise import Scores
from n3c.compiler.quantization.units import Linear, Unit
from n3c.ir.diagnostics import ExitCode, N3CError

FORMATS = ("nvfp4", "fp8", "bf16")


def unit(name: str, rows: int, formats: tuple[str, ...] = FORMATS) -> Unit:
    return Unit(name, (Linear(name, "mlp.up", (rows, 16), (f"{name}.weight",), None),), formats)


def best(units: list[Unit], scores: Scores, bits: float) -> float:
    """Return the least total score of all choices within the budget."""
    totals = [
        sum(scores[u.name][f] for u, f in zip(units, formats, strict=True))
        for formats in itertools.product(*(u.formats for u in units))
        if mean_bits(units, {u.name: f for u, f in zip(units, formats, strict=True)}) <= bits
    ]
    return min(totals)


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 500), st.floats(0.01, 100), st.floats(0, 1)), min_size=1, max_size=6),
    st.floats(4.5, 16),
)
def test_it_is_the_best_of_all_choices(drawn: list[tuple[int, float, float]], bits: float) -> None:
    units = [unit(f"u{i}", rows) for i, (rows, _, _) in enumerate(drawn)]
    scores = {f"u{i}": {"nvfp4": harm, "fp8": harm * part, "bf16": 0.0} for i, (_, harm, part) in enumerate(drawn)}
    chosen = choose(units, scores, bits)
    assert mean_bits(units, chosen) <= bits
    total = sum(scores[name][format_] for name, format_ in chosen.items())
    assert total == pytest.approx(best(units, scores, bits), rel=1e-6, abs=1e-6 * max(harm for _, harm, _ in drawn))


def test_hundreds_of_units_of_very_different_sizes() -> None:
    units = [unit(f"u{i}", 10 ** (1 + i % 6) + 16 * i) for i in range(300)]
    scores = {u.name: {"nvfp4": 1.0 + (i * 37 % 101) / 50, "fp8": 0.1, "bf16": 0.0} for i, u in enumerate(units)}
    chosen = choose(units, scores, 4.8)
    assert 4.79 < mean_bits(units, chosen) <= 4.8
    assert chosen == choose(units, scores, 4.8)


def test_a_budget_of_exactly_the_cheapest_is_met() -> None:
    units = [unit("a", 7), unit("b", 9, ("fp8", "bf16"))]
    scores = {"a": {"nvfp4": 1.0, "fp8": 0.5, "bf16": 0.0}, "b": {"fp8": 0.5, "bf16": 0.0}}
    least = (4.5 * 7 + 8 * 9) / 16
    assert choose(units, scores, least) == {"a": "nvfp4", "b": "fp8"}


def test_more_bits_never_count_as_harm() -> None:
    units = [unit("a", 1)]
    assert choose(units, {"a": {"nvfp4": 0.1, "fp8": 0.2, "bf16": 0.3}}, 16.0)["a"] in FORMATS
    chosen = choose(
        [unit("a", 1), unit("b", 1)],
        {
            "a": {"nvfp4": 0.1, "fp8": 5.0, "bf16": 0.0},
            "b": {"nvfp4": 1.0, "fp8": 0.0, "bf16": 0.0},
        },
        6.25,
    )
    assert mean_bits([unit("a", 1), unit("b", 1)], chosen) <= 6.25
    assert chosen["b"] == "fp8"


@pytest.mark.parametrize("bits", [4.4, 6.0])
def test_a_budget_below_the_cheapest(bits: float) -> None:
    units = [unit("a", 1), unit("b", 1, ("fp8", "bf16"))]
    scores = {u.name: dict.fromkeys(u.formats, 0.0) for u in units}
    with pytest.raises(N3CError) as caught:
        choose(units, scores, bits)
    (diagnostic,) = caught.value.diagnostics
    assert (diagnostic.code, caught.value.exit_code) == ("E0408", ExitCode.USAGE)
    assert diagnostic.help == "at least --effective-bits 6.25"


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_a_score_that_is_no_number(score: float) -> None:
    with pytest.raises(N3CError, match="the sensitivity of `a` in fp8") as caught:
        choose([unit("a", 1)], {"a": {"nvfp4": 0.0, "fp8": score, "bf16": 0.0}}, 8.0)
    assert (caught.value.diagnostics[0].code, caught.value.exit_code) == ("E0409", ExitCode.NUMERICS)
