"""Every kind of error in a spec: its text and place, against golden files (N3C_UPDATE_GOLDEN=1 rewrites them)."""

from __future__ import annotations

from pathlib import Path

import pytest

from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError
from n3c.specs.load import load_spec, parse_spec
from support.golden import GOLDEN, assert_golden
from support.specs import SPECS

GOOD = '''\
schema = 1
name = "good"

[model]
hidden_size = 64
vocab_size = 256
pattern = """
(ME)2  # twice
M*E-
"""
eos_token_ids = [2]

[mamba]
num_heads = 8
head_dim = 16
state_size = 16
n_groups = 2

[attention]
num_heads = 4
num_kv_heads = 2
head_dim = 16

[moe]
num_experts = 8
top_k = 2
intermediate_size = 32
latent_size = 32
n_group = 2
topk_group = 1

[mlp]
intermediate_size = 96

[mtp]
pattern = "*E"

[quantization]
format = "nvfp4"
[[quantization.rules]]
roles = ["attention.*", "lm_head"]
layers = "last 2"
format = "bf16"

[training]
format = "nvfp4"

[serving]
batch_sizes = [1, 4]
max_seq_len = 512
'''

# name → (what to replace in GOOD, by what), the overrides
Case = tuple[list[tuple[str, str]], list[str]]
CASES: dict[str, Case] = {
    "unknown_key": ([("latent_size = 32", "latent_dim = 32")], []),
    "unknown_key_of_another_table": ([("num_kv_heads = 2", "num_kv_heads = 2\ntop_k = 2")], []),
    "unknown_table": ([("[mlp]", "[mlpp]")], []),
    "unknown_top_level_key": ([('name = "good"', 'name = "good"\ndescription = "x"')], []),
    "unknown_quoted_key": ([("top_k = 2", 'top_k = 2\n"a \\u001b[31m b" = 1')], []),
    "unknown_dotted_key": ([("top_k = 2", "top_k = 2\nrouter.kind = 1")], []),
    "unknown_key_in_inline_rules": (
        [
            ('[[quantization.rules]]\nroles = ["attention.*", "lm_head"]\nlayers = "last 2"\nformat = "bf16"\n', ""),
            ('[quantization]\nformat = "nvfp4"', '[quantization]\nformat = "nvfp4"\nrules = [\n  { role = "x" }\n]'),
        ],
        [],
    ),
    "missing_keys": ([("num_kv_heads = 2\n", ""), ('name = "good"\n', ""), ("top_k = 2\n", "")], []),
    "missing_table": ([("[mlp]\nintermediate_size = 96\n", "")], []),
    "missing_model": ([("[model]\n", ""), ('schema = 1\nname = "good"\n', "")], []),
    "wrong_types": (
        [
            ("hidden_size = 64", "hidden_size = 64.0"),
            ("vocab_size = 256", 'vocab_size = "256"'),
            ("num_heads = 8", "num_heads = true"),
            ("num_experts = 8", "num_experts = 2020-01-01"),
            ("batch_sizes = [1, 4]", "batch_sizes = 1"),
            ("eos_token_ids = [2]", "eos_token_ids = [\n  2,\n  'x',\n]"),
        ],
        [],
    ),
    "table_is_a_value": ([('[mtp]\npattern = "*E"\n', ""), ('name = "good"', 'name = "good"\nmtp = "*E"')], []),
    "bounds": (
        [
            ("hidden_size = 64", "hidden_size = 0"),
            ("num_experts = 8", "num_experts = 1" + "0" * 30),
            ("vocab_size = 256", "vocab_size = -1"),
            ("[mlp]", "routed_scaling_factor = inf\n[mlp]"),
            ("eos_token_ids = [2]", "eos_token_ids = [2, -2]\nnorm_eps = 0\ninitializer_range = nan"),
        ],
        [],
    ),
    "too_many_entries": ([("batch_sizes = [1, 4]", f"batch_sizes = {list(range(1, 66))}")], []),
    "number_of_thousands_of_digits": ([("num_experts = 8", "num_experts = 1" + "0" * 5000)], []),
    "choices": (
        [
            ('format = "nvfp4"\n[[quan', 'format = "nvfp5"\nblock = [32, 32]\n[[quan'),
            ("schema = 1", "schema = 2"),
            ("max_seq_len = 512", 'max_seq_len = 512\nssm_state_dtype = "float32"'),
            ('layers = "last 2"\nformat = "bf16"', 'layers = "last 2"\nformat = "mxfp8"'),
        ],
        [],
    ),
    "name": ([('name = "good"', "name = '\"]; import os'")], []),
    "pattern_symbol": ([("M*E-\n", "M*X-\n")], []),
    "pattern_in_one_line": ([('pattern = "*E"', 'pattern = "\\u002AG"')], []),
    "pattern_literal": ([('pattern = "*E"', "pattern = '*E)'")], []),
    "pattern_explodes": ([("(ME)2  # twice", "(((ME)999)999)999")], []),
    "pattern_empty": ([('"*E"', '""')], []),
    "role_glob": ([('"attention.*", "lm_head"', '"atention.*", "lm_head",\n  "Moe.router", "zzz"')], []),
    "role_norm": (
        [
            (
                'roles = ["attention.*", "lm_head"]\nlayers = "last 2"\nformat = "bf16"',
                'roles = ["norm"]\nformat = "fp8"',
            )
        ],
        [],
    ),
    "layers_form": ([('"last 2"', '"the last two"')], []),
    "layers_beyond": ([('"last 2"', '"5..99"')], []),
    "layers_backwards": ([('"last 2"', '"5..3"')], []),
    "layers_too_many": ([('"last 2"', '"first 9"')], []),
    "rule_without_selection": ([('roles = ["attention.*", "lm_head"]\n', "")], []),
    "rule_with_both": ([('"lm_head"]', '"lm_head"]\nmodules = ["lm_head"]')], []),
    "rule_modules_and_layers": ([('roles = ["attention.*", "lm_head"]', 'modules = ["lm_head"]')], []),
    "module_name": ([('roles = ["attention.*", "lm_head"]\nlayers = "last 2"', 'modules = ["lm_head", "a;b"]')], []),
    "table_needed_by_mtp": (
        [("M*E-", "ME-"), ("[attention]\nnum_heads = 4\nnum_kv_heads = 2\nhead_dim = 16\n", "")],
        [],
    ),
    "mamba_groups": ([("n_groups = 2", "n_groups = 3")], []),
    "time_steps": ([("n_groups = 2", "n_groups = 2\ntime_step_min = 0.5")], []),
    "kv_heads": ([("num_kv_heads = 2", "num_kv_heads = 3")], []),
    "inner_width": ([("num_heads = 8\nhead_dim = 16", "num_heads = 65536\nhead_dim = 65536")], []),
    "top_k_and_experts": ([("top_k = 2", "top_k = 9")], []),
    "topk_group": ([("topk_group = 1", "topk_group = 3")], []),
    "experts_and_groups": ([("n_group = 2", "n_group = 3")], []),
    "groups_of_one": ([("n_group = 2", "n_group = 8")], []),
    "top_k_of_groups": ([("top_k = 2", "top_k = 5")], []),
    "layer_entries": (
        [
            (
                "topk_group = 1",
                "topk_group = 1\n"
                '[[moe.layers]]\nlayers = "0"\ntop_k = 2\n'
                '[[moe.layers]]\nlayers = "1"\n'
                '[[moe.layers]]\nlayers = "1..90"\nintermediate_size = 16\n'
                '[[moe.layers]]\nlayers = "mtp"\ntop_k = 5\nshared_intermediate_size = 64\n'
                '[[moe.layers]]\nlayers = "7"\ntop_k = 9\n',
            )
        ],
        [],
    ),
    "layer_keys": (
        [
            (
                "topk_group = 1",
                "topk_group = 1\n"
                "[[moe.layers]]\ntop_k = 2\n"
                '[[moe.layers]]\nlayers = "even"\nlatent_size = 16\nintermediate_size = "wide"\n',
            )
        ],
        ["moe.layers.0.top_k=0"],
    ),
    "mtp_pattern": ([('pattern = "*E"', 'pattern = "M*E-"')], []),
    "mtp_cut": ([('pattern = "*E"', 'pattern = "*|E"')], []),
    "tokens": ([("eos_token_ids = [2]", "eos_token_ids = [2, 256]\npad_token_id = 1000")], []),
    "max_seq_len": ([("max_seq_len = 512", "max_seq_len = 5000")], []),
    "prefill_chunk": ([("max_seq_len = 512", "max_seq_len = 512\nprefill_chunk = 513")], []),
    "batch_empty": ([("batch_sizes = [1, 4]", "batch_sizes = []")], []),
    "batch_twice": ([("batch_sizes = [1, 4]", "batch_sizes = [\n  1, 4,\n  1,\n]")], []),
    "toml_value": ([("hidden_size = 64", "hidden_size = sixty")], []),
    "toml_unclosed_string": ([('name = "good"', 'name = "good')], []),
    "toml_end": ([("max_seq_len = 512\n", "max_seq_len = ")], []),
    "toml_control_character": ([("schema = 1", "schema = 1 # \x1b[31m")], []),
    "duplicate_key": ([("num_kv_heads = 2", "num_kv_heads = 2\nnum_heads = 4")], []),
    "duplicate_table": ([("[mlp]", "[moe]")], []),
    "set_unknown": ([], ["moe.topk=3", "nothing=1"]),
    "set_values": ([], ["moe.top_k=99", "model.hidden_size=wide", "model.pattern=(ME", 'mtp.pattern="*M"']),
    "set_into_new_table": ([("[mlp]\nintermediate_size = 96\n", "")], ["mlp.width=3"]),
    "set_into_value": ([], ["name.x=1"]),
    "set_rule": ([], ["quantization.rules.0.format=fp9", "quantization.rules.1.format=fp8"]),
    "set_whole_rules": ([], ['quantization.rules=[{roles=["norm"], format="fp8"}]']),
    "several_at_once": (
        [
            ("top_k = 2", "top_k = 9"),
            ("latent_size", "latent_dim"),
            ("M*E-", "M*E-X"),
            ("n_groups = 2", "n_groups = 5"),
        ],
        [],
    ),
}


WARNINGS: dict[str, Case] = {
    "unused_table": ([("M*E-", "M*E")], []),
    "pattern_times": ([("(ME)2  # twice", "(ME)*2  # twice"), ("M*E-", "M*E")], []),
}


def broken(case: Case) -> str:
    text = GOOD
    for old, new in case[0]:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def compare(name: str, text: str) -> None:
    assert_golden(f"errors/{name}.txt", text)


def test_good_is_good() -> None:
    _, warnings = parse_spec(GOOD, "good.toml")
    assert warnings == []


@pytest.mark.parametrize("name", CASES)
def test_error(name: str) -> None:
    with pytest.raises(N3CError) as caught:
        parse_spec(broken(CASES[name]), f"{name}.toml", CASES[name][1])
    assert caught.value.exit_code is ExitCode.SPEC
    compare(name, "\n".join(item.render() for item in caught.value.diagnostics) + "\n")


@pytest.mark.parametrize("name", CASES)
def test_the_caret_is_in_the_line_it_names(name: str) -> None:
    text = broken(CASES[name])
    with pytest.raises(N3CError) as caught:
        parse_spec(text, "file", CASES[name][1])
    for item in caught.value.diagnostics:
        assert item.span is not None
        if item.span.file == "--set":
            assert item.span.source in CASES[name][1]
            continue
        line = text.split("\n")[item.span.line - 1]
        assert item.span.source == line[:200]
        assert 1 <= item.span.column <= len(line) + 1
        assert item.span.column + item.span.length - 1 <= max(item.span.column, len(line))


@pytest.mark.parametrize("name", WARNINGS)
def test_warning(name: str) -> None:
    spec, warnings = parse_spec(broken(WARNINGS[name]), f"{name}.toml")
    assert spec.mlp is None  # what the pattern never uses is no part of the model
    compare(name, "\n".join(item.render() for item in warnings) + "\n")


def one_error(error: N3CError) -> Diagnostic:
    assert len(error.diagnostics) == 1
    return error.diagnostics[0]


def test_unreadable_files(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path, Path("a\0b")):
        with pytest.raises(N3CError) as caught:
            load_spec(path)
        assert caught.value.exit_code is ExitCode.FILE
        assert one_error(caught.value).code == "E0601"


@pytest.mark.parametrize(
    ("key", "most"),
    [("model.max_position_embeddings", 2_147_483_647), ("moe.num_experts", 65_536), ("model.hidden_size", 1_048_576)],
)
def test_the_most_of_lengths_counts_and_widths(key: str, most: int) -> None:
    def codes(value: int) -> set[str]:
        try:
            load_spec(SPECS / "tiny.toml", [f"{key}={value}"])
        except N3CError as error:
            return {diagnostic.code for diagnostic in error.diagnostics}
        return set()

    assert "E0106" not in codes(most)
    assert codes(most + 1) == {"E0106"}


def test_not_utf8_is_located(tmp_path: Path) -> None:
    file = tmp_path / "latin1.toml"
    file.write_bytes(b'schema = 1\nname = "caf\xe9"\n')
    with pytest.raises(N3CError) as caught:
        load_spec(file)
    error = one_error(caught.value)
    assert caught.value.exit_code is ExitCode.SPEC
    assert error.code == "E0100"
    assert error.span is not None
    assert (error.span.line, error.span.column) == (2, 12)


def test_binary_and_empty_files(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    for content in (b"", b"\x00\x01\x02", b"\xff\xfe", b"[" * 100_000, b"a=" + b"[" * 100_000, b"=" * 10):
        file.write_bytes(content)
        with pytest.raises(N3CError) as caught:
            load_spec(file)
        assert caught.value.exit_code is ExitCode.SPEC


def test_huge_file_is_refused_without_reading_it() -> None:
    with pytest.raises(N3CError) as caught:
        load_spec("/dev/zero")
    assert one_error(caught.value).code == "E0100"


def test_errors_are_bounded() -> None:
    many = GOOD + "".join(f"key{index} = 1\n" for index in range(5000))
    with pytest.raises(N3CError) as caught:
        parse_spec(many, "many.toml")
    assert len(caught.value.diagnostics) == 100


def test_a_set_without_equals_is_a_usage_error() -> None:
    for given in ("moe.top_k", "=3", "moe..top_k=3", ""):
        with pytest.raises(N3CError) as caught:
            parse_spec(GOOD, "good.toml", [given])
        assert caught.value.exit_code is ExitCode.USAGE
        assert one_error(caught.value).code == "E0701"


def test_no_golden_file_is_left_over() -> None:
    assert {file.stem for file in (GOLDEN / "errors").glob("*.txt")} == {*CASES, *WARNINGS}
