"""The format of each linear in training, by the rules of [training]: the last rule that matches decides."""

from __future__ import annotations

from collections.abc import Iterator

from n3c.specs.modules import Group, module_groups
from n3c.specs.roles import match_roles, select_layers
from n3c.specs.schema import Rule, Spec

NOT_LINEAR = frozenset({"embedding", "mamba.conv1d", "moe.router", "mtp.mamba.conv1d", "mtp.moe.router"})
"""What has no low-precision form in training; the router is float32."""


def training_formats(spec: Spec) -> list[tuple[str, str]]:
    """Return (module of the generated model, format) of every linear that is not BF16, in the order of the layers.

    The routed experts of a layer are one module for each projection.
    """
    return list(_formats(spec))


def _formats(spec: Spec) -> Iterator[tuple[str, str]]:
    table = spec.training
    if table is None:
        return
    mtp = spec.mtp.pattern if spec.mtp else None
    for group in module_groups(spec.model.pattern, mtp, spec.moe, spec.model.tie_word_embeddings):
        if group.role in NOT_LINEAR:
            continue
        format_: str = table.format
        for rule in table.rules:
            if _matches(rule, group, spec):
                format_ = rule.format
        if format_ != "bf16":
            yield group.name.replace(".{}", ""), format_


def _matches(rule: Rule, group: Group, spec: Spec) -> bool:
    if rule.modules:
        experts = group.name.partition(".{}")[0]
        return any(module in (experts, *group.modules) for module in rule.modules)
    if rule.layers != "all" and group.layer not in select_layers(rule.layers, spec.model.pattern):
        return False
    return group.role in match_roles(rule.roles)
