"""A spec in Megatron-core's terms: the pattern, and which modules train in which precision.

Names of modules and matchers: Megatron-LM, megatron/core/quantization and megatron/core/models/hybrid (0.19.2).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise

from n3c.specs.blocks import MAMBA, MOE
from n3c.specs.kinds import kinds
from n3c.specs.modules import groups_of
from n3c.specs.pattern import to_megatron
from n3c.specs.schema import Spec

from .numerics import training_formats


@dataclass(frozen=True, slots=True)
class Precision:
    """Which linears train in which format, as Megatron-core's quantization recipe says it."""

    format: str
    """That of every linear which nothing else names: nvfp4, mxfp8 or bf16."""
    first: int
    """Layers at the start that are wholly BF16."""
    last: int
    """Layers at the end that are."""
    matchers: tuple[tuple[str, str], ...]
    """(glob over module names, format); the first that matches decides."""
    mtp_in_bf16: bool


def globs_of_roles() -> dict[str, str]:
    """Return role → the glob that names its modules; inside MTP they begin with `mtp.`."""
    modules = (module for kind in kinds() for module in kind.modules)
    return {m.role: m.megatron for m in modules if m.megatron is not None} | {"mtp.eh_proj": "mtp.*eh_proj"}


def megatron_pattern(spec: Spec) -> str:
    """Return `--hybrid-layer-pattern`: `|` at the cuts of the spec's pattern, `/` before each prediction step."""
    mtp = spec.mtp
    return to_megatron(spec.model.pattern, mtp.pattern if mtp else None, mtp.depth if mtp else 1)


def precision(spec: Spec) -> Precision:
    """Return the precision of training; `gaps` tells whether that is all that the spec asks for."""
    by_role, low = _formats(spec)
    total = len(spec.model.pattern)
    first, last = (min(low), total - 1 - max(low)) if low else (0, 0)
    inner = range(first, total - last)
    chosen: dict[str, str] = {}
    for role, formats in by_role.items():
        shown = {format_ for layer, format_ in formats.items() if layer is None or layer in inner}
        if shown:
            chosen[role] = min(shown)
    training = spec.training
    base = training.format if training and training.format != "bf16" else "bf16"
    if base == "bf16":  # only rules ask for low precision
        base = next((format_ for format_ in ("nvfp4", "mxfp8") if format_ in chosen.values()), "bf16")
    mtp = {role: format_ for role, format_ in chosen.items() if role.startswith("mtp.")}
    mtp_in_bf16 = all(format_ == "bf16" for format_ in mtp.values())
    matchers: dict[str, str] = {}
    if base != "bf16":
        if mtp and mtp_in_bf16:
            matchers["mtp.*"] = "bf16"
        else:
            matchers |= {_glob(role): format_ for role, format_ in mtp.items()}
        trunk = [(role, format_) for role, format_ in chosen.items() if role not in mtp]
        matchers |= {_glob(role): format_ for role, format_ in trunk if format_ != base}
    return Precision(base, first, last, tuple(matchers.items()), mtp_in_bf16)


def gaps(spec: Spec) -> list[str]:
    """Return what Megatron-Bridge's provider and recipe cannot say of this spec, in words for the user."""
    found: list[str] = []
    used = set(spec.blocks)
    mamba, moe = spec.mamba, spec.moe
    unknown = [kind for kind in kinds() if kind in used and not any(module.megatron for module in kind.modules)]
    found += [f"it has no {kind.title} blocks (`{kind.symbol}`)" for kind in unknown]
    if MAMBA in used and mamba is not None and (mamba.conv_kernel != 4 or not mamba.conv_bias):
        found.append("its convolution has 4 taps and a bias (mamba.conv_kernel, mamba.conv_bias)")
    if MOE in used and moe is not None:
        if moe.norm_topk_prob != (moe.top_k > 1):
            found.append("it divides the chosen scores by their sum if and only if top_k > 1 (moe.norm_topk_prob)")
        if moe.layers:
            found.append("its provider sizes all MoE layers alike (moe.layers)")
        if moe.n_group > 1 and moe.top_k // moe.topk_group != 2:
            found.append("it chooses groups by their best top_k / topk_group experts, model.py by two (moe.n_group)")
    stages = (0, *spec.model.pattern.stages, len(spec.model.pattern))
    if any(first == last for first, last in pairwise(stages)):
        found.append("a pipeline stage of the pattern has no layer")
    return found + _precision_gaps(spec)


def _precision_gaps(spec: Spec) -> list[str]:
    found: list[str] = []
    by_role, low = _formats(spec)
    formats = dict(training_formats(spec))
    if "lm_head" in formats:
        found.append("its output layer is BF16 (lm_head)")
    globs: dict[str, set[str]] = defaultdict(set)
    for role, of_layer in by_role.items():
        inner = range(min(low), max(low) + 1) if low else range(0)
        globs[_glob(role)] |= {format_ for layer, format_ in of_layer.items() if layer is None or layer in inner}
    several = sorted(glob for glob, found_ in globs.items() if len(found_) > 1)
    if several:
        found.append(f"between the BF16 layers at both ends, each of {', '.join(several)} has one format ([training])")
    table = spec.training
    if table is not None and any(
        rule.format == "nvfp4" and rule.block not in (None, table.block) for rule in table.rules
    ):
        found.append("all NVFP4 weights have blocks of one shape (training.rules.block)")
    return found


def _formats(spec: Spec) -> tuple[dict[str, dict[int | None, str]], list[int]]:
    """Return role → layer → format, and the trunk layers that have a linear in low precision."""
    formats = dict(training_formats(spec))
    by_role: dict[str, dict[int | None, str]] = defaultdict(dict)
    named = globs_of_roles()
    low: set[int] = set()
    for group in groups_of(spec):
        if group.role not in named and group.role.removeprefix("mtp.") not in named:
            continue
        format_ = formats.get(group.name.replace(".{}", ""), "bf16")
        by_role[group.role][group.layer] = format_
        if format_ != "bf16" and group.layer is not None:
            low.add(group.layer)
    return by_role, sorted(low)


def _glob(role: str) -> str:
    named = globs_of_roles()
    return named[role] if role in named else "mtp." + named[role.removeprefix("mtp.")]
