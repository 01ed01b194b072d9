"""The linears of a model by their names in released checkpoints, grouped by role and layer.

Names: Megatron-Bridge, src/megatron/bridge/models/nemotronh/nemotron_h_bridge.py (mapping_registry).
"""

from __future__ import annotations

from dataclasses import dataclass

from .pattern import BlockKind, Pattern
from .schema import Moe, Spec


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


_BLOCKS = {
    BlockKind.MAMBA: (
        ("mamba.in_proj", "in_proj"),
        ("mamba.conv1d", "conv1d"),
        ("mamba.out_proj", "out_proj"),
    ),
    BlockKind.ATTENTION: tuple((f"attention.{name}", name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
    BlockKind.MLP: (("mlp.up", "up_proj"), ("mlp.down", "down_proj")),
}


def module_groups(main: Pattern, mtp: Pattern | None, moe: Moe | None, tied: bool) -> list[Group]:
    """Return every group of a model, in the order of the layers; the head is left out where it is the embedding."""
    groups = [Group("embedding", None, "backbone.embeddings")]
    for layer, kind in enumerate(main):
        groups += _block(kind, f"backbone.layers.{layer}.mixer", moe, layer, "")
    if not tied:
        groups.append(Group("lm_head", None, "lm_head"))
    if mtp is not None:
        groups.append(Group("mtp.eh_proj", None, "mtp.layers.0.eh_proj"))
        for layer, kind in enumerate(mtp):
            groups += _block(kind, f"mtp.layers.{layer}.mixer", moe, None, "mtp.")
    return groups


def groups_of(spec: Spec) -> list[Group]:
    """Return every group of the model of `spec`."""
    mtp = None if spec.mtp is None else spec.mtp.pattern
    return module_groups(spec.model.pattern, mtp, spec.moe, spec.model.tie_word_embeddings)


def _block(kind: BlockKind, mixer: str, moe: Moe | None, layer: int | None, prefix: str) -> list[Group]:
    if kind is not BlockKind.MOE:
        return [Group(prefix + role, layer, f"{mixer}.{name}") for role, name in _BLOCKS[kind]]
    if moe is None:
        return []
    named = [("moe.router", "gate", 0)]
    if moe.latent_size is not None:
        named += [("moe.latent_down", "fc1_latent_proj", 0), ("moe.latent_up", "fc2_latent_proj", 0)]
    named += [(f"moe.experts.{half}", f"experts.{{}}.{half}_proj", moe.num_experts) for half in ("up", "down")]
    if moe.shared_intermediate_size:
        named += [(f"moe.shared.{half}", f"shared_experts.{half}_proj", 0) for half in ("up", "down")]
    return [Group(prefix + role, layer, f"{mixer}.{name}", count) for role, name, count in named]
