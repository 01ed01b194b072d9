"""The record of a block kind: what n3c knows of a kind besides how it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

Values = Mapping[str, Any]
"""Dotted path → value, of what is good by itself, defaults included; a key that is missing or bad is absent."""
Say = Callable[[str, str, str, str | None], None]
"""`say(path, code, message, advice)`: report about the value, or the table, at a dotted path."""


CONTRADICTION = "E0218"
"""The code of what the keys of an extension's table say of each other."""
OWN_TEMPLATES = "n3c.backends.torch"
"""The package with the templates of n3c's own block kinds."""


@dataclass(frozen=True)
class Module:
    """A module with a weight: its role, and its name in released checkpoints after `….mixer.`."""

    role: str
    name: str
    """`{}` in it stands for the index of an expert."""
    when: str | None = None
    """A key of the table; the module is left out where that is 0 or not given."""
    count: str | None = None
    """A key of the table: how many modules `name` stands for; else it is one."""
    linear: bool = True
    """Whether the module is a linear; a weight of any other keeps the type of the model."""
    megatron: str | None = None
    """The glob that names it in Megatron-core's recipes; None: they give it no format."""


@dataclass(frozen=True)
class ConfigKey:
    """The name of a key of the table in a nemotron_h config.json."""

    key: str
    name: str
    default: Any
    """That of transformers' NemotronHConfig."""
    aliases: tuple[str, ...] = ()
    """Other names in use."""
    also: str | None = None
    """The one of `aliases` that is written, too, since a reader knows no other."""


@dataclass(frozen=True, eq=False)
class BlockKind:
    """A kind of residual block. Kinds are compared by identity: there is one record for each."""

    symbol: str
    """Its symbol in patterns."""
    name: str
    """Its function in the IR, and its template."""
    title: str
    """Its name in messages."""
    legend: str
    """Its name in comments of generated code."""
    class_name: str
    """Its mixer in generated code."""
    table: str
    """Its table in the spec."""
    table_class: type
    """The dataclass of that table; its fields are made by `key`."""
    lowering: str
    """`module:function` of what emits a block: (Block, Spec, x [B, S, D]) → what is added to x, a Value."""
    modules: tuple[Module, ...]
    hf_names: tuple[str, ...]
    """Entries of `layers_block_type` that mean it: first that of transformers since 5.13, last that of messages."""
    config_keys: tuple[ConfigKey, ...]
    """Every key of the table, and what Hugging Face calls it."""
    letters: Mapping[str, str] = field(default_factory=dict[str, str])
    """Letter → the size that it stands for, in ops, generated code and documentation; no letter has two meanings."""
    vectors: Mapping[str, str] = field(default_factory=dict[str, str])
    """Parameter of the mixer that belongs to no module → its role, which reports name and no rule does."""
    contradictions: Callable[[Values, Say], None] | None = None
    """Reports what the keys of the table say of each other."""
    stateful: bool = False
    """Whether decoding carries a state; its template then has `state()`, and plan_state rewrites its ops."""
    in_mtp: bool = False
    """Whether an MTP pattern may have it."""
    in_transformers: bool = True
    """Whether transformers' NemotronHConfig takes it; where not, no modeling_n3c.py is written for it."""
    templates: str = OWN_TEMPLATES
    """The package whose folder `templates` has the templates of the kind."""
    files: tuple[str, ...] = ()
    """Files of the generated package that only models with this kind have."""
    imports: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    """Module of the generated package → what the mixer needs of it."""

    @property
    def template(self) -> str:
        """The file in the folder of `templates` that holds what only this kind has of model.py."""
        return f"blocks/{self.name}.jinja"

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles of its modules, that rules can name."""
        return tuple(module.role for module in self.modules)

    def module(self, role: str) -> Module:
        """Return the module of `role`; KeyError where the record has none."""
        for module in self.modules:
            if module.role == role:
                return module
        raise KeyError(f"{role}: not a role of {self.title} blocks")

    def present(self, table: object) -> Iterator[tuple[Module, int]]:
        """Yield the modules that a block of these sizes has, each with how many it stands for (0: it is one)."""
        for module in self.modules:
            if module.when is None or getattr(table, module.when, None):
                yield module, getattr(table, module.count, 0) if module.count else 0
