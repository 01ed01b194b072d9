"""The published recipe: the formats of a model for which neither config nor spec gives any, as rules.

It is ModelOpt's for Nemotron 3 (modelopt_recipes/models/nvidia/…/ptq of nvidia-modelopt 0.47: Super, Ultra,
Nano): routed experts in 4 bits, and so dense MLPs, which it does not know; Mamba projections and shared experts in
FP8; attention, latent projections, router, convolution, embedding, head and the MTP block in BF16. Linears in FP8
run with a static scale of their input, so a checkpoint without activation scales has them in BF16.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from n3c.ir.diagnostics import Diagnostic, Severity, Span
from n3c.ir.formats import FORMATS

from .layer_tables import moe_tables
from .modules import groups_of
from .roles import ROUTERS, not_linear
from .rules_table import role_globs
from .schema import Format, Quantization, Rule, Spec

DEFAULT = Quantization(format="nvfp4", block=(1, 16))
"""The formats that are asked for by default, before exclusions."""

SENSITIVE = ("attention.*", "moe.latent_*", "mtp.*", "lm_head")
"""BF16, as what is no linear's and routers are."""
EIGHT_BITS = ("mamba.in_proj", "mamba.out_proj", "moe.shared.*")
"""FP8 where the default is a 4-bit format and activations are calibrated."""

NOTE = "W0622"
"""The code of the note about the recipe."""
DEFAULT_EXCLUSIONS = "default exclusions"
DEFAULT_FP8 = "default FP8"
NO_WHOLE_BLOCKS = "default: no whole blocks"


@dataclass(frozen=True, slots=True)
class Recipe:
    """The published formats of one model."""

    table: Quantization
    names: tuple[str, ...]
    """The reason for each rule of the table, as the ledger states it."""

    @property
    def names_by_path(self) -> dict[str, str]:
        """Path of a rule → its name."""
        return {f"quantization.rules.{index}": name for index, name in enumerate(self.names)}

    def note(self, place: Span) -> Diagnostic:
        """Return the note that tells the formats of a spec for which nobody chose any."""
        said = "; ".join(
            f"{', '.join(rule.roles)}: {rule.format} ({name})"
            for rule, name in zip(self.table.rules, self.names, strict=True)
        )
        message = f"the formats are those of the published recipe: {self.table.format}, but {said}"
        help_ = "a [quantization] table of your own replaces them"
        return Diagnostic(NOTE, message, place, Severity.NOTE, help_)


def published_recipe(
    spec: Spec, format_: Format = "nvfp4", block: tuple[int, int] = (1, 16), *, calibrated: bool = True
) -> Recipe:
    """Return the published formats of the model of `spec`, whatever its [quantization] is.

    `format_` is that of every linear that no rule names, `calibrated` whether activations have scales. Rules name
    only roles that the model has; a role whose weights do not divide into `block` stays BF16.
    """
    present = list(dict.fromkeys(group.role for group in groups_of(spec)))
    stored = FORMATS[format_]
    eight = _matching(present, EIGHT_BITS) if stored.blocked else []
    excluded = [role for role in present if role in not_linear() | ROUTERS] + _matching(present, SENSITIVE)
    excluded += [] if calibrated else eight
    left = [role for role in present if role not in (*eight, *excluded)]
    odd = [role for role in left if not all(stored.divides(*shape, block[0]) for shape in _shapes(role, spec))]
    rules: dict[str, Rule] = {}
    if calibrated and eight:
        rules[DEFAULT_FP8] = Rule(format="fp8", roles=_globs(eight, present))
    if excluded:
        rules[DEFAULT_EXCLUSIONS] = Rule(format="bf16", roles=_globs(excluded, present))
    if odd:
        rules[NO_WHOLE_BLOCKS] = Rule(format="bf16", roles=tuple(odd))
    return Recipe(Quantization(format_, block, tuple(rules.values())), tuple(rules))


def is_published(spec: Spec) -> bool:
    """Return whether [quantization] of `spec` is the published recipe, or missing, so that nobody chose other formats.

    An imported config that gives no formats has the recipe of a calibrated checkpoint.
    """
    table = spec.quantization
    return table is None or table == published_recipe(spec, table.format, table.block).table


def _matching(roles: Iterable[str], globs: Iterable[str]) -> list[str]:
    return [role for role in roles if any(fnmatchcase(role, glob) for glob in globs)]


def _globs(roles: list[str], present: list[str]) -> tuple[str, ...]:
    in_order = [role for role in present if role in roles]
    return tuple(role_globs(in_order, present))


def _shapes(role: str, spec: Spec) -> set[tuple[int, int]]:
    """Return rows and columns of the weights of a role that may have 4 bits: experts and MLPs."""
    sizes = [(1, spec.model.hidden_size)]
    if role.startswith("moe.experts."):
        sizes = [(moe.intermediate_size, moe.latent_size or spec.model.hidden_size) for moe in moe_tables(spec)]
    elif spec.mlp is not None:
        sizes = [(spec.mlp.intermediate_size, spec.model.hidden_size)]
    return {(inner, outer) if role.endswith(".up") else (outer, inner) for inner, outer in sizes}
