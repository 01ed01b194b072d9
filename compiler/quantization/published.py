"""The formats of a model whose spec says none: the exclusions of the published recipes, as rules to be read.

The recipes are ModelOpt's for Nemotron 3 (modelopt_recipes/models/nvidia/…/ptq of nvidia-modelopt 0.47: Super,
Ultra, Nano): routed experts and dense MLPs in 4 bits; Mamba projections and shared experts in FP8; attention,
latent projections, router, convolution, embedding, head and the MTP block in BF16. FP8 linears run with a
static scale of their input, so without activation scales they stay in BF16 too.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from n3c.ir.diagnostics import Diagnostic, Severity, Span
from n3c.passes.lower.model import lower
from n3c.passes.quantize import NVFP4_FORMATS, linear_parameters
from n3c.specs.modelopt import role_globs
from n3c.specs.schema import Format, Quantization, Rule, Spec

EXCLUDED = ("attention.*", "moe.router", "moe.latent_*", "mamba.conv1d", "mtp.*", "embedding", "lm_head")
EIGHT_BITS = ("mamba.in_proj", "mamba.out_proj", "moe.shared.*")
"""FP8 where the default is a 4-bit format and activations are calibrated."""

DEFAULT_EXCLUSIONS = "default exclusions"
DEFAULT_FP8 = "default FP8"
NO_WHOLE_BLOCKS = "default: no whole blocks"


def published_formats(
    spec: Spec, format_: Format, block: tuple[int, int], *, calibrated: bool
) -> tuple[Quantization, dict[str, str]]:
    """Return a [quantization] table for `spec`, and what each of its rules is: path → words for the ledger.

    `format_` is that of every linear that no rule names. Rules name only roles that the model has; a role with
    a weight that does not divide into `block` stays BF16.
    """
    program = lower(spec)
    linears = linear_parameters(program)
    matrices = [p for p in program.parameters.values() if len(p.type.dims) > 1]
    present = list(dict.fromkeys(parameter.role for parameter in matrices))
    four_bits = format_ in NVFP4_FORMATS
    eight = [role for role in present if four_bits and _matches(role, EIGHT_BITS)]
    excluded = [role for role in present if _matches(role, EXCLUDED) or (not calibrated and role in eight)]
    cut = {p.role for p in matrices if p.name in linears and _cuts(block, p.type.static_dims)}
    odd = [role for role in present if four_bits and role in cut and role not in (*excluded, *eight)]
    rules: dict[str, Rule] = {}
    if calibrated and eight:
        rules[DEFAULT_FP8] = Rule(format="fp8", roles=tuple(role_globs(eight, present)))
    if excluded:
        rules[DEFAULT_EXCLUSIONS] = Rule(format="bf16", roles=tuple(role_globs(excluded, present)))
    if odd:
        rules[NO_WHOLE_BLOCKS] = Rule(format="bf16", roles=tuple(odd))
    words = {f"quantization.rules.{i}": name for i, name in enumerate(rules)}
    return Quantization(format_, block, tuple(rules.values())), words


def _matches(role: str, globs: tuple[str, ...]) -> bool:
    return any(fnmatchcase(role, glob) for glob in globs)


def _cuts(block: tuple[int, int], shape: tuple[int, ...]) -> bool:
    """Whether the last two dims do not divide into whole blocks."""
    return any(size % part for size, part in zip(shape[-2:], block, strict=True))


def note(table: Quantization, words: Mapping[str, str], place: str) -> Diagnostic:
    """Return the note that says which formats were chosen for a spec without [quantization]."""
    said = "; ".join(
        f"{', '.join(rule.roles)}: {rule.format} ({name})"
        for rule, name in zip(table.rules, words.values(), strict=True)
    )
    message = f"nothing says the formats: {table.format}, but {said}"
    help_ = "--write-spec FILE writes these rules; a [quantization] table of your own replaces them"
    return Diagnostic("W0622", message, Span(place), Severity.NOTE, help_)
