"""The fit of Super on GPUs, by hand: 170,229,760 + 6,635,520 bytes a request, and 9,216 a token of it."""

from __future__ import annotations

from typing import Any

import pytest

from n3c.compiler.report.memory_fit import RESERVED_GB
from support.command import n3c
from support.specs import SPECS

FIXED, A_TOKEN = 170_229_760 + 6_635_520, 8_192 + 1_024


def rows(command: str, *more: object) -> dict[int, dict[str, Any]]:
    result = n3c(command, SPECS / "super.toml", "--json", *more)
    assert result.code == 0, result.err
    return {row["gpu_gb"]: row for row in result.data["fits"]}


@pytest.mark.parametrize("command", ["check", "inspect"])
def test_super_at_its_full_context(command: str) -> None:
    context = 1_048_576
    weights = n3c("inspect", SPECS / "super.toml", "--json").data["weights"]["bytes"]
    found = rows(command, "--context", context, "--batch", 2)
    for gb, row in found.items():
        free = (gb - RESERVED_GB) * 10**9 - weights
        request = FIXED + context * A_TOKEN
        assert row["fits"] == (2 * request <= free)
        assert row["most_requests"] == max(0, free // request)
        assert row["longest_context"] == max(0, min(context, (free // 2 - FIXED) // A_TOKEN))
        assert row["gpus"] == -(-(weights + 2 * request) // ((gb - RESERVED_GB) * 10**9))
    assert [gb for gb, row in found.items() if row["fits"]] == [141, 180]


def test_a_longer_context_than_a_card_takes_is_said() -> None:
    assert rows("check", "--context", 131_072)[96]["fits"]
    assert not rows("check", "--context", 131_072, "--batch", 16)[96]["fits"]
    assert rows("check", "--context", 131_072, "--batch", 16)[96]["gpus"] == 2


def test_the_table_for_people() -> None:
    said = n3c("check", SPECS / "super.toml", "--context", 4096)
    assert "141 GB (H200)" in said.out + said.err
    assert "GB (H200)" not in n3c("check", SPECS / "super.toml").out
    said = n3c("inspect", SPECS / "super.toml")
    assert "6,635,520 bytes a request for 3 (full copies of the states would be 510,689,280)" in said.out + said.err
