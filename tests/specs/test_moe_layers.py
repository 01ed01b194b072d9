"""`[[moe.layers]]` and `block_configs`: which block has which sizes, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from n3c.ir.diagnostics import N3CError
from n3c.specs.convert import run_import
from n3c.specs.dump import dump_spec
from n3c.specs.huggingface import export_config
from n3c.specs.layer_tables import moe_of_block, moe_tables
from n3c.specs.load import parse_spec
from n3c.specs.schema import Spec
from support.specs import LAYERS, small_spec

MOE = {"block_type": "moe", "moe_intermediate_size": 512, "num_experts_per_tok": 4}
WIDE = {"block_type": "moe", "moe_intermediate_size": 768, "num_experts_per_tok": 8}
MTP = {"block_type": "moe", "moe_intermediate_size": 2688, "num_experts_per_tok": 22}
PUZZLE: Mapping[str, Any] = {
    "architectures": ["NemotronHPuzzleForCausalLM"],
    "attention_bias": False,
    "auto_map": {"AutoConfig": "configuration_nemotron_h_puzzle.NemotronHPuzzleConfig"},
    "block_configs": [{"block_type": "mamba"}, MOE, {"block_type": "mamba"}, WIDE],
    "chunk_size": 128,
    "head_dim": 64,
    "hidden_size": 256,
    "mamba_head_dim": 32,
    "mamba_num_heads": 8,
    "model_type": "nemotron_h_puzzle",
    "moe_latent_size": 128,
    "moe_shared_expert_intermediate_size": 1024,
    "mtp_block_configs": [{"block_type": "attention"}, MTP],
    "n_groups": 4,
    "n_routed_experts": 32,
    "n_shared_experts": 1,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "num_nextn_predict_layers": 1,
    "ssm_state_size": 64,
    "tie_word_embeddings": False,
    "vocab_size": 1024,
}
"""The form of the published configs (Megatron-Bridge, tests of nemotronh_puzzle): no pattern, no usual sizes."""


def imported(folder: Path, config: Mapping[str, Any]) -> Spec:
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return run_import(folder / "config.json").spec


def sizes(spec: Spec) -> list[tuple[int, int]]:
    return [(table.top_k, table.intermediate_size) for table in moe_tables(spec)]


def test_later_entries_decide_key_by_key() -> None:
    spec = small_spec(LAYERS + '[[moe.layers]]\nlayers = "first 5"\ntop_k = 2\n')
    found = {block: moe_of_block(spec, block) for block in (1, 4, 7, 9)}
    assert {block: (moe.top_k, moe.intermediate_size) for block, moe in found.items() if moe} == {
        1: (2, 32),
        4: (2, 48),
        7: (4, 48),
        9: (2, 64),
    }
    assert moe_of_block(spec, None) is spec.moe
    assert parse_spec(dump_spec(spec), "again.toml")[0] == spec


def test_a_published_config(tmp_path: Path) -> None:
    """The usual sizes are those of multi-token prediction; what is exported is imported as the same spec."""
    spec = imported(tmp_path, PUZZLE)
    assert (spec.model.pattern.symbols, spec.mtp and spec.mtp.pattern.symbols) == ("MEME", "*E")
    assert sizes(spec) == [(4, 512), (8, 768), (22, 2688)]
    assert spec.moe is not None and (spec.moe.top_k, [entry.layers for entry in spec.moe.layers]) == (22, ["1", "3"])
    exported = export_config(spec)
    assert exported["model_type"] == "nemotron_h_puzzle"
    for name in ("block_configs", "mtp_block_configs"):
        assert [entry | block for entry, block in zip(exported[name], PUZZLE[name], strict=True)] == exported[name]
    assert imported(tmp_path, exported) == spec
    del exported["n3c"]
    assert imported(tmp_path, exported | {"n3c": {"name": spec.name}}).moe == spec.moe


def test_stretches_of_equal_blocks_are_one_entry(tmp_path: Path) -> None:
    config = {**PUZZLE, "num_hidden_layers": 8, "num_nextn_predict_layers": 0}
    config["block_configs"] = [WIDE, {"block_type": "attention"}, WIDE, MOE, MOE, MOE, WIDE, WIDE]
    spec = imported(tmp_path, config)
    assert sizes(spec) == [(8, 768)] * 2 + [(4, 512)] * 3 + [(8, 768)] * 2
    assert spec.moe is not None and (spec.moe.top_k, [entry.layers for entry in spec.moe.layers]) == (8, ["3..5"])


def test_a_config_whose_blocks_are_all_alike_has_no_entries(tmp_path: Path) -> None:
    config = {
        **PUZZLE,
        "block_configs": [{"block_type": "mamba", "ssm_state_size": 64}, MOE | {"n_routed_experts": 32}],
    }
    spec = imported(tmp_path, {**config, "num_hidden_layers": 2, "mtp_block_configs": [MOE]})
    assert spec.moe is not None and (spec.moe.layers, spec.moe.top_k) == ((), 4)
    assert export_config(spec)["model_type"] == "nemotron_h"


@pytest.mark.parametrize(
    ("changes", "code", "said", "source"),
    [
        ({"block_configs": [{"block_type": "no_op"}]}, "E0108", "no_op", "{"),
        ({"block_configs": [{"attention": {"no_op": True}}]}, "E0105", "each with `block_type`", "block_configs"),
        ({"layers_block_type": ["mamba", "moe", "mamba", "mamba"]}, "E0303", "block_configs", "block_configs"),
        ({"block_configs": [{"block_type": "attention", "sliding_window": 512}]}, "E0304", "sliding_window", "sliding"),
        ({"block_configs": [MOE, WIDE | {"moe_latent_size": 64}]}, "E0304", "64, and 128 elsewhere", "latent"),
        ({"block_configs": [MOE | {"num_experts_per_tok": "4"}]}, "E0105", "`top_k` must be an integer", "per_tok"),
        ({"block_configs": [MOE | {"num_experts_per_tok": 33}]}, "E0206", "more than `num_experts` 32", "per_tok"),
        ({"mtp_block_configs": [MOE | {"num_experts_per_tok": 44}]}, "E0206", "`top_k` 44 is more", 'per_tok": 44'),
        ({"mtp_block_configs": [MOE, WIDE]}, "E0304", "differ from each other", "mtp_block_configs"),
        ({"n3c": {"moe_layers": [{"layers": "1", "top_k": 5}]}}, "E0303", "`n3c.moe_layers`", "moe_layers"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], code: str, said: str, source: str, tmp_path: Path) -> None:
    blocks = changes.get("block_configs", PUZZLE["block_configs"])
    with pytest.raises(N3CError) as caught:
        imported(tmp_path, {**PUZZLE, "num_hidden_layers": len(blocks), **changes})
    found = [item for item in caught.value.diagnostics if item.code == code]
    assert found and said in found[0].message, caught.value.diagnostics
    assert found[0].span is not None and source in (found[0].span.source or ""), found[0].render()
