"""Loading, overriding and writing specs that are right."""

from __future__ import annotations

import dataclasses
import tomllib
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from n3c.ir.diagnostics import N3CError
from n3c.specs import toml_places
from n3c.specs.dump import dump_spec, toml_value
from n3c.specs.load import MAX_SPEC_BYTES, load_spec, parse_spec
from n3c.specs.pattern import Pattern
from n3c.specs.places import Text
from n3c.specs.roles import all_roles, match_roles, select_layers
from n3c.specs.schema import Serving, Spec
from n3c.specs.toml_places import TomlPlaces, scan_string
from support.random_specs import spec_texts, specs

MINIMAL = """
name = "minimal"
model = { hidden_size = 1_6, vocab_size = 8, pattern = "M" }
mamba = { num_heads = 2, head_dim = 8, state_size = 4, n_groups = 1 }
"""


def test_minimal_spec_takes_defaults() -> None:
    spec, warnings = parse_spec(MINIMAL, "minimal.toml")
    assert warnings == []
    assert spec.schema == 1
    assert spec.model.hidden_size == 16
    assert spec.model.max_position_embeddings == 4096
    assert (spec.model.pad_token_id, spec.model.bos_token_id, spec.model.eos_token_ids) == (None, None, ())
    assert spec.mamba is not None
    assert spec.mamba.conv_kernel == 4
    assert (spec.attention, spec.moe, spec.mlp, spec.mtp, spec.quantization, spec.training) == (None,) * 6
    # The default capacity, 8192, is lowered to what the model allows.
    assert spec.serving == dataclasses.replace(Serving(), max_seq_len=4096)


def test_serving_lengths_follow_the_model() -> None:
    spec, _ = parse_spec(MINIMAL, "x.toml", ["model.max_position_embeddings=100"])
    assert (spec.serving.max_seq_len, spec.serving.prefill_chunk) == (100, 100)
    spec, _ = parse_spec(MINIMAL, "x.toml", ["serving.max_seq_len=30"])
    assert (spec.serving.max_seq_len, spec.serving.prefill_chunk) == (30, 30)


def test_integers_are_good_floats() -> None:
    spec, _ = parse_spec(MINIMAL, "x.toml", ["model.norm_eps=1"])
    assert spec.model.norm_eps == 1.0
    assert isinstance(spec.model.norm_eps, float)


def test_windows_text_and_byte_order_mark() -> None:
    spec, _ = parse_spec("\ufeff" + MINIMAL.replace("\n", "\r\n"), "x.toml")
    assert spec.name == "minimal"
    span = spec.span("model.hidden_size")
    assert span is not None
    assert (span.line, span.column) == (3, 25)


def test_spans() -> None:
    text = 'name="x"\n[model]\nhidden_size=8\nvocab_size=8\npattern="""\n(M)2\n- # c\n"""\n'
    text += "[mlp]\nintermediate_size=8\n[mamba]\n"
    text += "num_heads=1\nhead_dim=8\nstate_size=4\nn_groups=1\n[quantization]\nformat='bf16'\n"
    text += "[[quantization.rules]]\nroles=['*']\nformat='fp8'\n"
    spec, _ = parse_spec(text, "x.toml")
    assert str(spec.span("model.pattern.0")) == "x.toml:6:2"
    assert str(spec.span("model.pattern.1")) == "x.toml:6:2"
    assert str(spec.span("model.pattern.2")) == "x.toml:7:1"
    assert str(spec.span("mlp.intermediate_size")) == "x.toml:10:19"
    assert str(spec.span("mamba.conv_kernel")) == "x.toml:11:1"  # a default: the table
    assert str(spec.span("quantization.rules.0")) == "x.toml:18:1"
    assert spec.span("serving.max_seq_len") is None


def test_overrides() -> None:
    spec, _ = parse_spec(
        MINIMAL,
        "x.toml",
        [
            "model.pattern=(M-)2",
            "mlp.intermediate_size=8",
            "mlp.intermediate_size = 12",
            "name=12",
            "serving.batch_sizes=[2, 3]",
            "serving.batch_sizes.1=5",
            "quantization.format=fp8",
            'quantization.rules=[{roles=["*"], format="bf16"}]',
            "quantization.rules.0.layers=1",
        ],
    )
    assert spec.model.pattern.symbols == "M-M-"
    assert spec.mlp is not None
    assert spec.mlp.intermediate_size == 12
    assert spec.name == "12"  # a string is wanted
    assert spec.serving.batch_sizes == (2, 5)
    assert spec.quantization is not None
    assert spec.quantization.rules[0].layers == "1"
    span = spec.span("model.pattern.3")
    assert span is not None
    assert (span.file, span.column, span.source) == ("--set", 17, "model.pattern=(M-)2")


def test_an_override_cannot_smuggle_keys() -> None:
    with pytest.raises(N3CError, match="E0105"):
        parse_spec(MINIMAL, "x.toml", ["model.hidden_size=8\nvocab_size=9"])


@settings(max_examples=30)
@given(specs())
def test_dump_loads_back(spec: Spec) -> None:
    text = dump_spec(spec)
    again, warnings = parse_spec(text, "again.toml")
    assert again == spec
    assert warnings == []
    assert dump_spec(again) == text


def test_long_values_are_written_over_several_lines() -> None:
    symbols = "".join("M" if index**3 % 101 < 50 else "-" for index in range(300))
    spec, _ = parse_spec(MINIMAL, "x.toml", [f"model.pattern={symbols}", "mlp.intermediate_size=8"])
    text = dump_spec(spec)
    assert parse_spec(text, "again.toml")[0] == spec
    assert '"""' in text


@given(st.text())
def test_strings_are_written_as_toml(text: str) -> None:
    assert tomllib.loads(f"x = {toml_value(text)}")["x"] == text


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**63), 2**63 - 1))
def test_numbers_are_written_as_toml(number: float) -> None:
    assert tomllib.loads(f"x = {toml_value(number)}")["x"] == number


@settings(max_examples=30)
@given(spec_texts(), st.data())
def test_any_damage_is_a_located_error(text: str, data: st.DataObject) -> None:
    """Whatever is cut out of, or put into, a spec: it loads, or N3CError says where it does not."""
    start = data.draw(st.integers(0, len(text)))
    stop = data.draw(st.integers(start, min(len(text), start + 12)))
    middle = data.draw(st.text('[]{}"=\n#.,0123456789abcxME*-(|)' + "\0\u20ac\ud7ff'\\", max_size=6))
    damaged = text[:start] + middle + text[stop:]
    try:
        parse_spec(damaged, "damaged.toml")
    except N3CError as error:
        lines = damaged.replace("\r\n", "\n").split("\n")
        for item in error.diagnostics:
            assert item.span is not None
            assert 1 <= item.span.line <= len(lines)
            assert 1 <= item.span.column <= len(lines[item.span.line - 1]) + 1


@given(st.text(max_size=30), st.sampled_from(['"', "'", '"""', "'''"]))
def test_string_offsets(text: str, quote: str) -> None:
    """The scanner decodes every kind of string as tomllib does, and points into the text."""
    literal = toml_value(text) if quote == '"' else f"{quote}{text}{quote}"
    document = f"x = {literal}\n"
    try:
        expected = tomllib.loads(document)["x"]
    except (tomllib.TOMLDecodeError, KeyError):
        return
    if not isinstance(expected, str):
        return
    value, offsets = scan_string(document.replace("\r\n", "\n"), 4)
    assert value == expected
    assert len(offsets) == len(value) + 1
    assert offsets == sorted(offsets)


def test_multi_line_string_offsets() -> None:
    document = 'x = """\nM\\u0045\\\n   *""\\"- """""\n'
    value, offsets = scan_string(document, 4)
    assert value == tomllib.loads(document)["x"] == 'ME*"""- ""'
    assert [document[offset] for offset in offsets[:5]] == ["M", "\\", "*", '"', '"']


def test_places_of_every_form() -> None:
    document = """\
a.b."c d" = 1
arr = [ 1, # one
  [2, 3],
  { x = 4, "y z" = [5] , w.v = 6 } ]
[[t.u]]
k = 1
[[t.u]]
k = 2
[t.u.v]
w = 1979-05-27 07:32:00 # date
"""
    places = TomlPlaces(Text(document, "f"))
    assert str(places.key(("a", "b", "c d"))) == "f:1:1"
    assert str(places.value(("a", "b", "c d"))) == "f:1:13"
    assert str(places.value(("arr", 1, 1))) == "f:3:7"
    assert str(places.key(("arr", 2, "x"))) == "f:4:5"
    assert str(places.key(("arr", 2, "y z"))) == "f:4:12"
    assert str(places.value(("arr", 2, "y z", 0))) == "f:4:21"
    assert str(places.key(("arr", 2, "w"))) == str(places.key(("arr", 2, "w", "v"))) == "f:4:26"
    assert str(places.value(("arr", 2, "w", "v"))) == "f:4:32"
    assert str(places.value(("t", "u", 1, "k"))) == "f:8:5"
    assert str(places.key(("t", "u", 1))) == "f:7:1"
    span = places.value(("t", "u", 1, "v", "w"))
    assert span is not None
    assert (span.line, span.column, span.length) == (10, 5, 19)
    assert places.key(("nowhere",)) is None


def test_layer_selectors() -> None:
    pattern = Pattern.parse("MEM*EMM*E")
    assert select_layers("all", pattern) == frozenset(range(9))
    assert select_layers("3", pattern) == {3}
    assert select_layers("3..5", pattern) == {3, 4, 5}
    assert select_layers("first 2", pattern) == {0, 1}
    assert select_layers("last 2", pattern) == {7, 8}
    assert select_layers("before attention", pattern) == {2, 6}
    for bad in ("9", "3..9", "5..3", "first 0", "last 10", "", "first", "-1", "3..", "..3", "3 ..5", "١", "9" * 5000):
        with pytest.raises(ValueError, match=r"layer|empty"):
            select_layers(bad, pattern)


def test_roles() -> None:
    assert len(all_roles()) == len(set(all_roles()))
    assert match_roles(["attention.*"]) == {f"attention.{name}_proj" for name in "qkvo"}
    assert match_roles(["moe.latent_*", "lm_head"]) == {"moe.latent_down", "moe.latent_up", "lm_head"}
    assert match_roles(["*"]) == set(all_roles())
    assert not match_roles(["Attention.*"])


def test_unused_table_is_left_out(tmp_path: object) -> None:
    spec, warnings = parse_spec(MINIMAL + "[moe]\nnum_experts=4\ntop_k=1\nintermediate_size=8\n", "x.toml")
    assert spec.moe is None
    assert [(item.code, str(item.span)) for item in warnings] == [("W0201", "x.toml:5:1")]


def test_places_end_where_a_spec_has_more_than_any_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toml_places, "MAX_PLACES", 3)
    places = TomlPlaces(Text("a = 1\nb = [1, 2, 3, 4]\nc = 1\n", "f"))
    assert str(places.key(("a",))) == "f:1:1"
    assert places.key(("c",)) is None


def test_a_spec_that_is_too_large(tmp_path: Path) -> None:
    path = tmp_path / "large.toml"
    path.write_text("#" * (MAX_SPEC_BYTES + 1))
    with pytest.raises(N3CError, match=r"E0100.*larger than 4 MiB") as caught:
        load_spec(path)
    assert caught.value.exit_code == 3
    path.write_text(MINIMAL + "#" * (MAX_SPEC_BYTES - len(MINIMAL)))
    assert load_spec(path)[0].name


def test_load_reads_files() -> None:
    with pytest.raises(N3CError, match="E0601"):
        load_spec("specs/none.toml")


def test_long_patterns_are_written_in_full_lines() -> None:
    """None is longer than 100 columns, some are exactly that, and what begins a line had no place on the one above."""
    random, longest = Random(0), 0
    for _ in range(50):
        groups = ("".join(random.choices("ME*-", k=random.randint(1, 4))) * random.randint(2, 9) for _ in range(40))
        pattern = Pattern.parse("".join(groups))
        first, *lines, last = toml_value(pattern, 10).split("\n")
        assert first == last == '"""' and Pattern.parse(" ".join(lines)).symbols == pattern.symbols
        for line, after in pairwise(lines):
            assert len(line) <= 100 < len(line) + 1 + len(after.partition(" ")[0])
        longest = max(longest, *map(len, lines))
    assert longest == 100
