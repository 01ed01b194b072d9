"""The linears of a model by their names in released checkpoints, grouped by role and layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace

from .block_kind import BlockKind
from .keys import COUNT
from .kinds import kinds
from .pattern import Pattern
from .schema import Spec


@dataclass(frozen=True, slots=True)
class Group:
    """The weights of one role in one layer: one module, or one for each routed expert."""

    role: str
    layer: int | None
    """The trunk layer; None outside the trunk's blocks."""
    name: str
    """The module, or that of each routed expert with `{}` for its index."""
    experts: int = 0
    """How many experts `name` stands for; 0: it is one module."""

    @property
    def modules(self) -> tuple[str, ...]:
        """The names of the modules."""
        return tuple(self.name.format(index) for index in range(self.experts)) if self.experts else (self.name,)


def groups_of(spec: Spec) -> list[Group]:
    """Return every group of a spec's model, in the order of the layers."""
    tables = {kind.table: spec.table(kind) for kind in kinds()}
    mtp = spec.mtp.pattern if spec.mtp else None
    return module_groups(spec.model.pattern, mtp, tables, spec.model.tie_word_embeddings)


def readable_sizes(raw: Mapping[str, Mapping[str, object]]) -> dict[str, SimpleNamespace]:
    """Return the sizes that module names depend on, of tables that are not read yet; bad values are 0."""

    def size(value: object) -> int:
        return value if type(value) is int and 0 < value <= COUNT else 0

    keys = {kind.table: [config.key for config in kind.config_keys] for kind in kinds() if kind.table in raw}
    return {
        table: SimpleNamespace(**{name: size(raw[table].get(name)) for name in names}) for table, names in keys.items()
    }


def module_groups(main: Pattern, mtp: Pattern | None, tables: Mapping[str, object], tied: bool) -> list[Group]:
    """Return every group of a model, in the order of the layers; the head is left out where it is the embedding.

    `tables` maps the names of the block kinds' tables to their sizes.
    """
    groups = [Group("embedding", None, "backbone.embeddings")]
    for layer, kind in enumerate(main):
        groups += _block(kind, tables, f"backbone.layers.{layer}.mixer", layer, "")
    if not tied:
        groups.append(Group("lm_head", None, "lm_head"))
    if mtp is not None:
        groups.append(Group("mtp.eh_proj", None, "mtp.layers.0.eh_proj"))
        for layer, kind in enumerate(mtp):
            groups += _block(kind, tables, f"mtp.layers.{layer}.mixer", None, "mtp.")
    return groups


def _block(kind: BlockKind, tables: Mapping[str, object], mixer: str, layer: int | None, prefix: str) -> list[Group]:
    present = kind.present(tables.get(kind.table))
    return [Group(prefix + module.role, layer, f"{mixer}.{module.name}", count) for module, count in present]
