"""The records of the block kinds are whole: what derives from them finds everything that it needs."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from n3c.ir.extensions import part
from n3c.specs.block_kind import BlockKind
from n3c.specs.blocks import KINDS, MOE, Moe
from n3c.specs.reader import entry_class, fields_of, plain, spec_fields
from support.random_specs import BLOCK_TABLES

ROOT = Path(__file__).parents[2]

each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


@each_kind
def test_every_key_of_the_table_has_a_name_for_hugging_face(kind: BlockKind) -> None:
    table, _, required = spec_fields()[kind.table]
    assert not required
    assert plain(table) is kind.table_class
    assert [config.key for config in kind.config_keys] == [
        name for name, (hint, _, _) in fields_of(plain(table)).items() if not entry_class(hint)
    ]


@each_kind
def test_conditions_and_counts_are_keys_of_the_table(kind: BlockKind) -> None:
    keys = fields_of(kind.table_class).keys()
    named = {key for module in kind.modules for key in (module.when, module.count) if key is not None}
    assert named <= keys
    assert all(("{}" in module.name) == (module.count is not None) for module in kind.modules)


@each_kind
def test_it_is_lowered_generated_and_drawn(kind: BlockKind) -> None:
    assert callable(part(kind.lowering))
    assert kind in BLOCK_TABLES
    assert list((ROOT / "backends/torch/templates").rglob(kind.template))


def test_nothing_is_said_twice() -> None:
    said = [(kind.symbol, kind.name, kind.table, kind.class_name) for kind in KINDS]
    for names in zip(*said, strict=True):
        assert len(set(names)) == len(KINDS)
    words = [name for kind in KINDS for name in (*kind.hf_names, *kind.roles)]
    assert len(set(words)) == len(words)
    configured = [name for kind in KINDS for key in kind.config_keys for name in (key.name, *key.aliases)]
    assert len(set(configured)) == len(configured)


def test_modules_that_a_block_has() -> None:
    table = Moe(num_experts=4, top_k=2, intermediate_size=16)
    assert [module.role for module, _ in MOE.present(table)] == ["moe.router", "moe.experts.up", "moe.experts.down"]
    assert [count for _, count in MOE.present(table)] == [0, 4, 4]


@each_kind
def test_defaults_are_those_of_transformers(kind: BlockKind) -> None:
    """A config that leaves out a key means what transformers means without it."""
    theirs = importlib.import_module("transformers").NemotronHConfig()
    given = {config.name: config.default for config in kind.config_keys if hasattr(theirs, config.name)}
    assert given == {name: getattr(theirs, name) for name in given}
