"""The pattern DSL and its foreign forms."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from n3c.specs.blocks import ATTENTION, MLP, MOE
from n3c.specs.pattern import (
    Pattern,
    PatternError,
    from_hybrid_override,
    from_layers_block_type,
    from_megatron,
    to_megatron,
)

SUPER = "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME"


@pytest.mark.parametrize(
    ("text", "symbols"),
    [
        ("MEM*-", "MEM*-"),
        ("(ME)4", "ME" * 4),
        ("M3 *2", "MMM**"),
        ("((ME)2 M*E)2", "MEMEM*E" * 2),
        ("  M E # the rest is a comment ((( \n *\t-\r\n", "ME*-"),
        ("((M))", "M"),
        ("(M)1", "M"),
    ],
)
def test_parse(text: str, symbols: str) -> None:
    pattern = Pattern.parse(text)
    assert pattern.symbols == symbols
    assert len(pattern) == len(symbols)
    assert "".join(kind.symbol for kind in pattern) == symbols
    assert pattern.text == text
    assert "".join(text[offset] for offset in pattern.offsets) == symbols


@pytest.mark.parametrize(
    ("text", "doubted"),
    [
        ("(ME)*4", ["*4"]),
        ("ME*12 (M*2)3", ["*12", "*2"]),
        ("(ME) *4", []),
        ("(ME)4*E", []),
        ("*4E", []),
        ("**4", []),
        ("M # (ME)*4\n*2", []),
    ],
)
def test_a_star_that_looks_like_a_sign_for_times_is_doubted(text: str, doubted: list[str]) -> None:
    pattern = Pattern.parse(text)
    assert [text[doubt.offset :][: doubt.length] for doubt in pattern.doubts()] == doubted
    assert not list(Pattern.parse(pattern.compact()).doubts())


def test_blocks_are_counted() -> None:
    assert Pattern.parse("(ME)*4").summary() == "6 layers: 1 M, 1 E, 4 *"
    assert Pattern.parse("-").summary() == "1 layer: 1 -"


@pytest.mark.parametrize(
    ("text", "message", "offset", "length"),
    [
        ("", "pattern has no blocks", 0, 1),
        (" # M\n", "pattern has no blocks", 0, 5),
        ("MEX", "`X` is not a pattern symbol", 2, 1),
        ("ME/ME", "`/` is not a pattern symbol", 2, 1),
        ("M\x1b", "`\\x1b` is not a pattern symbol", 1, 1),
        ("M(ME", "`(` is never closed", 1, 1),
        ("M((ME)2", "`(` is never closed", 1, 1),
        ("ME)2", "`)` closes no group", 2, 1),
        ("M()3", "empty group", 1, 2),
        ("M( # M\n)3", "empty group", 1, 7),
        ("4M", "`4` repeats nothing", 0, 1),
        ("(ME) 4", "`4` repeats nothing", 5, 1),
        ("(ME)0", "a repetition must be at least 1", 4, 1),
        ("M(M|E)2", "a pipeline cut `|` cannot stand inside a group", 3, 1),
        ("(((M)999)999)999", "pattern has more than 4096 blocks", 1, 11),
        ("E M" + "9" * 5000, "pattern has more than 4096 blocks", 2, 5001),
        ("M" * 4097, "pattern has more than 4096 blocks", 4096, 1),
    ],
)
def test_errors_say_where(text: str, message: str, offset: int, length: int) -> None:
    with pytest.raises(PatternError) as caught:
        Pattern.parse(text)
    assert (caught.value.message, caught.value.offset, caught.value.length) == (message, offset, length)


def test_small_letter_is_suggested() -> None:
    with pytest.raises(PatternError) as caught:
        Pattern.parse("Me")
    assert caught.value.advice == "did you mean `E`?"


def test_deep_nesting_is_no_recursion() -> None:
    assert Pattern.parse("(" * 50_000 + "M" + ")" * 50_000).symbols == "M"


def test_longest() -> None:
    assert len(Pattern.parse("((M)64)64")) == 4096


@pytest.mark.parametrize(
    ("symbols", "text"),
    [
        (SUPER, "((ME)3 M*E)3 ((ME)4 M*E)4 (ME)3 M*E (ME)4"),
        ("MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME", "(MEMEM*E)5 (ME)3 M*E (ME)4"),
        ("ME", "ME"),
        ("MMMM", "MMMM"),
        ("M" * 8, "M8"),
        ("MMM", "MMM"),
        ("*E*E*E", "(*E)3"),
    ],
)
def test_compact_reads_well(symbols: str, text: str) -> None:
    assert Pattern.parse(symbols).compact() == text


@given(st.text("ME*-|", min_size=1, max_size=60).filter(lambda text: text.strip("|") != ""))
def test_compact_parses_back(text: str) -> None:
    pattern = Pattern.parse(text)
    assert Pattern.parse(pattern.compact()) == pattern


@given(st.text("ME*-() \n#|0123456789x", max_size=40))
def test_any_text_parses_or_is_refused_in_place(text: str) -> None:
    try:
        pattern = Pattern.parse(text)
    except PatternError as error:
        assert 0 <= error.offset <= max(0, len(text) - 1)
        assert error.offset + error.length <= max(1, len(text))
    else:
        assert Pattern.parse(pattern.compact()) == pattern


def test_compact_of_the_longest_is_quick() -> None:
    # Quadratic work in 4096 blocks would be seconds; the bound on the period keeps it linear.
    pattern = Pattern.parse("(ME-M*)800")
    assert pattern.compact() == "(ME-M*)800"


@given(
    st.text("ME*-|", min_size=1, max_size=30).filter(lambda text: text.strip("|") != ""),
    st.text("*E", min_size=1, max_size=4),
    st.integers(0, 3),
)
def test_megatron_round_trip(main: str, mtp: str, depth: int) -> None:
    text = main + f"/{mtp}" * depth
    parsed = from_megatron(text)
    assert parsed[2] == depth
    assert to_megatron(*parsed) == text


def test_megatron_example() -> None:
    main, mtp, depth = from_megatron("M-M-|M-M*-/*E/*E")
    assert (main.symbols, main.stages) == ("M-M-M-M*-", (4,))
    assert mtp == Pattern.parse("*E")
    assert depth == 2


@pytest.mark.parametrize(
    ("text", "message", "offset"),
    [
        ("ME/*E/E*", "every MTP step must be the same: `E*` is not `*E`", 6),
        ("ME/*|E", "`|` is not a pattern symbol", 4),
        ("MG", "`G` is not a pattern symbol", 1),
        ("M(E)2", "`(` is not a pattern symbol", 1),
        ("/*E", "pattern has no blocks", 0),
        ("", "pattern has no blocks", 0),
    ],
)
def test_megatron_errors(text: str, message: str, offset: int) -> None:
    with pytest.raises(PatternError) as caught:
        from_megatron(text)
    assert (caught.value.message, caught.value.offset) == (message, offset)


@given(st.text("ME*-", min_size=1, max_size=30))
def test_hugging_face_forms(symbols: str) -> None:
    pattern = from_hybrid_override(symbols)
    older = {"M": "mamba", "E": "moe", "*": "attention", "-": "mlp"}
    newer = older | {"M": "linear_attention", "*": "full_attention"}
    for names in (older, newer):
        assert from_layers_block_type([names[symbol] for symbol in symbols]) == pattern
    assert from_layers_block_type(list(symbols)) == pattern


def test_hugging_face_errors() -> None:
    with pytest.raises(PatternError, match=r"`\(` is not a pattern symbol"):
        from_hybrid_override("M(E)2")
    with pytest.raises(PatternError, match="unknown block type `gru`") as caught:
        from_layers_block_type(["mamba", "gru"])
    assert caught.value.offset == 1
    with pytest.raises(PatternError, match="no blocks"):
        from_layers_block_type([])
    with pytest.raises(PatternError, match="more than 4096"):
        from_layers_block_type(["mamba"] * 5000)


def test_membership_and_layers() -> None:
    pattern = Pattern.parse("MEM*E")
    assert ATTENTION in pattern
    assert MLP not in pattern
    assert pattern.layers(MOE) == (1, 4)
