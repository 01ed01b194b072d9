"""The fit of Super on GPUs, by hand: 170,229,760 + 6,635,520 bytes a request, and 9,216 a token of it."""

from __future__ import annotations

import re
from typing import Any

import pytest

from n3c.backends.gpus import GPUS
from n3c.compiler.report.memory_fit import RESERVED
from support.command import n3c
from support.specs import SPECS

FIXED, A_TOKEN = 170_229_760 + 6_635_520, 8_192 + 1_024


def rows(command: str, *more: object) -> dict[str, dict[str, Any]]:
    result = n3c(command, SPECS / "super.toml", "--json", *more)
    assert result.code == 0, result.err
    return {row["gpu"]: row for row in result.data["fits"]}


def test_super_at_its_full_context() -> None:
    context = 1_048_576
    weights = n3c("inspect", SPECS / "super.toml", "--json").data["weights"]["bytes"]
    found = rows("inspect", "--context", context, "--batch", 2)
    assert list(found) == list(GPUS)
    for name, row in found.items():
        assert row["memory_bytes"] == GPUS[name].memory
        free = GPUS[name].memory - RESERVED - weights
        request = FIXED + context * A_TOKEN
        assert row["fits"] == (2 * request <= free)
        assert row["most_requests"] == max(0, free // request)
        assert row["longest_context"] == max(0, min(context, (free // 2 - FIXED) // A_TOKEN))
        assert row["gpus"] == -(-(weights + 2 * request) // (GPUS[name].memory - RESERVED))
    assert [name for name, row in found.items() if row["fits"]] == ["RTX PRO 6000", "DGX Spark", "H200 SXM", "B200"]


def test_a_longer_context_than_a_gpu_takes_is_said() -> None:
    card = "RTX PRO 6000"
    assert rows("check", "--context", 131_072)[card]["fits"]
    assert not rows("check", "--context", 131_072, "--batch", 32)[card]["fits"]
    assert rows("check", "--context", 131_072, "--batch", 32)[card]["gpus"] == 2


@pytest.mark.parametrize(
    ("arguments", "sms"),
    [
        ((), {120}),
        (("--sm", "portable"), {86, 89, 120, 121}),
        (("--sm", "90,100", "--trt", "full"), {90, 100}),
        (("--target", "torch"), {80, 86, 89, 90, 100, 120, 121}),
    ],
)
def test_check_tells_of_the_gpus_that_it_checks_for(arguments: tuple[str, ...], sms: set[int]) -> None:
    assert {GPUS[name].sm for name in rows("check", *arguments)} == sms


@pytest.mark.parametrize(("arguments", "sms"), [(("--sm", "86,89"), {86, 89}), (("--trt", "rtx"), {86, 89, 120, 121})])
def test_inspect_tells_of_the_gpus_that_are_asked_for(arguments: tuple[str, ...], sms: set[int]) -> None:
    assert {GPUS[name].sm for name in rows("inspect", *arguments)} == sms


@pytest.mark.parametrize("command", ["check", "inspect"])
def test_any_other_memory(command: str) -> None:
    (row,) = rows(command, "--context", 131_072, "--memory", "100GB").values()
    assert (row["memory_bytes"], row["trt"], row["fits"]) == (100 * 10**9, [], True)
    for size in ("3GB", "0GB", "much"):
        result = n3c(command, SPECS / "super.toml", "--memory", size, "--json")
        assert (result.code, result.codes) == (2, ["E0701"])
        assert result.data["diagnostics"][0]["message"].startswith("--memory: ")


def test_gpus_that_no_tensorrt_serves_so() -> None:
    result = n3c("inspect", SPECS / "super.toml", "--sm", "90", "--trt", "rtx", "--json")
    assert (result.code, result.codes) == (2, ["E0701"])


def test_the_table_for_people() -> None:
    said = n3c("check", SPECS / "super.toml", "--context", 4096)
    assert "RTX PRO 6000" in said.out + said.err
    assert "RTX PRO 6000" not in n3c("check", SPECS / "super.toml").out
    said = n3c("inspect", SPECS / "super.toml")
    assert re.search(
        r"6,635,520 bytes a request for 3\n +\(510,689,280 if the states were copied\)\n", said.out + said.err
    )
