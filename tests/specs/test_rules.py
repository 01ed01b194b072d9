"""Which rule decides a weight: by role, layer and module, the last that matches."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest

from n3c.specs.pattern import Pattern
from n3c.specs.roles import select_layers
from n3c.specs.rules import FormatRule, FormatRules, format_rules
from support.specs import small_spec

DEFAULT = FormatRule("quantization.format", "nvfp4", 16)


@dataclass(frozen=True)
class Weight:
    """A weight as a rule sees it."""

    name: str
    role: str
    layer: int | None = None


HEAD = Weight("lm_head.weight", "lm_head")
NORM = Weight("backbone.layers.7.norm.weight", "norm", 7)
UP = Weight("backbone.layers.7.mixer.experts.*.up_proj.weight", "moe.experts.up", 7)
ROUTER = Weight("backbone.layers.7.mixer.gate.weight", "moe.router", 7)
BIAS = Weight("backbone.layers.7.mixer.gate.e_score_correction_bias", "moe.router", 7)
MTP = Weight("mtp.layers.0.mixer.q_proj.weight", "mtp.attention.q_proj", 8)


def by_role(role: str, *, layers: frozenset[int] | None = None) -> FormatRule:
    return FormatRule("quantization.rules.0", "fp8", 16, roles=(role,), layers=layers)


def by_module(module: str) -> FormatRule:
    return FormatRule("quantization.rules.0", "fp8", 16, modules=(module,))


@pytest.mark.parametrize(
    ("rule", "weight", "matches"),
    [
        (by_role("moe.*"), UP, True),
        (by_role("moe.experts.down"), UP, False),
        (by_role("*", layers=frozenset({7})), UP, True),
        (by_role("*", layers=frozenset({6})), UP, False),
        (by_role("*", layers=frozenset({7})), HEAD, False),  # in no layer
        (by_role("*", layers=frozenset({7})), MTP, False),  # beyond the trunk
        (by_role("*"), HEAD, True),
        (by_role("attention.*"), MTP, False),
        (by_module("backbone.layers.7.mixer.experts"), UP, True),
        (by_module("backbone.layers.7.mixer.experts.0.up_proj"), UP, False),  # experts of a layer have one format
        (by_module("backbone.layers.7.mixer"), UP, False),
        (by_module("backbone.layers.7.mixer"), ROUTER, False),
        (by_module("backbone.layers.7.mixer.gate"), ROUTER, True),
        (by_module("backbone.layers.7.mixer.gate"), BIAS, False),
        (by_module("lm_head"), HEAD, True),
    ],
)
def test_what_a_rule_selects(rule: FormatRule, weight: Weight, *, matches: bool) -> None:
    assert rule.matches(weight) == matches


@pytest.mark.parametrize(
    ("rule", "weight", "is_linear", "decides"),
    [
        (by_role("*"), UP, True, True),
        (by_role("*"), NORM, False, False),
        (by_role("norm"), NORM, False, True),
        (by_module("backbone.layers.7.norm"), NORM, False, True),
        (by_role("moe.router"), ROUTER, True, True),
        (by_role("moe.router"), BIAS, False, False),  # the role means its linear
        (by_role("moe.experts.down"), NORM, False, False),
    ],
)
def test_what_is_no_linear_is_decided_by_name_only(
    rule: FormatRule, weight: Weight, *, is_linear: bool, decides: bool
) -> None:
    assert FormatRules(DEFAULT, (rule,)).decide(weight, is_linear=is_linear) == (rule if decides else None)


def test_the_last_rule_that_matches_decides_and_else_the_default() -> None:
    first, last = by_role("moe.*"), FormatRule("quantization.rules.1", "bf16", 16, roles=("moe.experts.*",))
    rules = FormatRules(DEFAULT, (first, last))
    assert [rules.decide(weight, is_linear=True) for weight in (UP, ROUTER, HEAD)] == [last, first, DEFAULT]


def test_faults_and_warnings() -> None:
    rules = FormatRules(
        DEFAULT, (by_role("mlp.*"), FormatRule("quantization.rules.1", "fp8", 16, roles=("mlp.*", "*")))
    )
    assert [(d.code, "rules.0" in d.message) for d in rules.faults([UP, HEAD])] == [("E0401", True)]
    assert [d.code for d in rules.warnings([UP, HEAD])] == ["W0402", "W0402"]


@pytest.mark.parametrize("name", ["quantization", "training"])
def test_both_tables_are_read_alike(name: str) -> None:
    text = f"""
[{name}]
format = "nvfp4"
block = [16, 16]
[[{name}.rules]]
roles = ["mamba.*"]
layers = "last 2"
format = "bf16"
[[{name}.rules]]
modules = ["lm_head"]
format = "nvfp4"
block = [1, 16]
"""
    rules = format_rules(small_spec(text), "quantization" if name == "quantization" else "training")
    assert (rules.default.path, rules.default.format) == (f"{name}.format", "nvfp4")
    first, second = rules.exceptions
    assert (first.path, first.layers, first.block_rows) == (f"{name}.rules.0", frozenset({6, 7}), 16)
    assert (second.layers, second.modules, second.block_rows) == (None, ("lm_head",), 1)
    assert first.span is not None
    assert format_rules(small_spec(), "training").default.path == "no [training]"


PATTERN = Pattern.parse("MEM*M*-M")  # 8 layers


@pytest.mark.parametrize(
    ("selector", "layers"),
    [
        ("all", set(range(8))),
        ("0", {0}),
        ("7", {7}),
        ("0..7", set(range(8))),
        ("3..3", {3}),
        ("2..4", {2, 3, 4}),
        ("first 1", {0}),
        ("first 8", set(range(8))),
        ("last 1", {7}),
        ("last 8", set(range(8))),
        ("last 3", {5, 6, 7}),
        ("before attention", {2, 4}),
    ],
)
def test_the_layers_of_a_selector(selector: str, layers: set[int]) -> None:
    assert select_layers(selector, PATTERN) == layers


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ("8", "there is no layer 8: the pattern has layers 0 to 7"),
        ("3..8", "there is no layer 8"),
        ("4..3", "`4..3` is empty: 4 comes after 3"),
        ("first 0", "of a pattern with 8 layers"),
        ("last 9", "of a pattern with 8 layers"),
        ("999999999", "there is no layer 999999999"),
        ("1" * 10, "selects no layers"),  # no number of layers has ten digits
        ("first 1234567890", "selects no layers"),
        ("١", "selects no layers"),  # a digit, but not of TOML
        ("3..", "selects no layers"),
        ("..3", "selects no layers"),
        ("middle 2", "selects no layers"),
        ("", "selects no layers"),
    ],
)
def test_a_selector_of_no_layers(selector: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        select_layers(selector, PATTERN)
