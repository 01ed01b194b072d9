"""What an element costs, put together of parts with round numbers; what is read again, by hand."""

from __future__ import annotations

import pytest

from n3c.backends import kernel_work
from n3c.backends.kernel_work import STORED, Choice, Cost, Repeated, rounded_up, sum_cost
from n3c.ir.types import DType

PARTS = {
    "STORED": {DType.F32: Cost(1, 2), DType.F8E4M3: Cost(10, 20), DType.F4E2M1: Cost(100, 200)},
    "SINGLE": Cost(1000, 2000),
    "FP4_BY_TABLE": Cost(3, 4),
    "FP8_BY_TABLE": Cost(5, 6),
    "SIBLING": Cost(7, 9),
    "_NORM": 0.25,
    "_NORM_SINGLE": 0.5,
    "_GROUPED_NORM": 0.125,
    "_GROUPED_NORM_SINGLE": 0.0625,
    "_RELU2": 0.03125,
    "_ROUND": 0.015625,
}


@pytest.fixture(autouse=True)
def parts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in PARTS.items():
        monkeypatch.setattr(kernel_work, name, value)


@pytest.mark.parametrize(
    ("dtype", "around", "cost"),
    [
        (DType.F32, (), (1, 2)),
        (DType.F8E4M3, (), (10, 20)),
        (DType.I64, (), (1000, 2000)),  # unknown types go by single elements
        (DType.F8E4M3, ("Gather",), (1000, 2000)),
        (DType.F8E4M3, ("Relu",), (1000.03125, 2000)),
        (DType.F4E2M1, (), (100, 200)),  # whose own cost is that of single elements
        (DType.F4E2M1, ("Gather",), (100, 200)),
        (DType.F8E4M3, ("RMSNormalization",), (10.25, 20)),
        (DType.F4E2M1, ("RMSNormalization",), (100.5, 200)),
        (DType.F8E4M3, ("Sqrt",), (10.125, 20)),
        (DType.F8E4M3, ("Gather", "Sqrt"), (1000.0625, 2000)),
        (DType.F8E4M3, ("QuantizeLinear",), (10.015625, 20)),
        (DType.F8E4M3, ("RMSNormalization", "Sqrt", "QuantizeLinear"), (10.390625, 20)),
    ],
)
def test_the_cost_of_an_element(dtype: DType, around: tuple[str, ...], cost: tuple[float, float]) -> None:
    assert sum_cost(dtype, around, fp8=False, by_table=False) == Cost(*cost)


def test_types_of_two_bytes_cost_the_same() -> None:
    assert STORED[DType.BF16] == STORED[DType.F16]


@pytest.mark.parametrize(("fp8", "cost"), [(True, (5, 6)), (False, (3, 4))])
def test_the_cost_of_an_element_that_tables_decode(fp8: bool, cost: tuple[float, float]) -> None:
    assert sum_cost(DType.I8, (), fp8=fp8, by_table=True) == Cost(*cost)


def test_further_outputs_add_theirs_and_what_is_computed_anew() -> None:
    assert sum_cost(DType.F32, (), fp8=False, by_table=False, outputs=4) == Cost(1 + 3 * 7, 2 + 3 * 9)
    found = sum_cost(DType.F32, ("RMSNormalization",), fp8=False, by_table=False, outputs=4)
    assert found == Cost(1 + 3 * 7 + 4 * 0.25, 2 + 3 * 9)


@pytest.mark.parametrize(("size", "rounded"), [(1, 16), (15, 16), (16, 16), (17, 32), (100, 112)])
def test_tensor_cores_take_tiles(size: int, rounded: int) -> None:
    assert rounded_up(size) == rounded


def test_what_is_read_again_of_a_whole_weight() -> None:
    again = Repeated(bytes=100, passes=4)
    assert again.further == 300
    assert [again.missed(cache) for cache in (0, 40, 99, 100, 1000)] == [300, 180, 3, 0, 0]
    assert Repeated(bytes=100, passes=1).further == 0


def test_what_is_read_again_of_experts() -> None:
    """2 tokens choose 1 of 2 experts each: 1.5 of them on average, read twice unless the cache holds an expert."""
    choice = Choice(experts=2, top_k=1, tokens=2)
    assert (choice.distinct, choice.fetched(0), choice.fetched(1)) == (1.5, 2, 1.5)
    again = Repeated(bytes=100, passes=2, choice=choice)
    assert (again.further, again.missed(0), again.missed(99), again.missed(100)) == (50, 50, 50, 0)
    three = Choice(experts=2, top_k=1, tokens=3)
    assert [three.fetched(kept) for kept in (0, 1, 2, 9)] == [3, 2, 1.75, 1.75]
    assert Choice(experts=2, top_k=1, tokens=3, by_expert=True).fetched(0) == three.distinct == 1.75
