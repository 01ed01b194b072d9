"""What the templates lay out: every value of a spec, resolved to a Python literal or a flag.

Spec text never reaches generated code as it is. Strings are checked against the form that they
must have, numbers are written from their value, and anything else is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import fields
from typing import cast

from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError
from n3c.specs.block_kind import BlockKind
from n3c.specs.blocks import ATTENTION, BY_SYMBOL, KINDS, MAMBA, MLP, MOE, Moe
from n3c.specs.pattern import Pattern
from n3c.specs.schema import Spec

from .numerics import training_formats

MODULE = re.compile(r"[a-z_]+(\.[a-z0-9_]+)*")
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,79}")
SHA256 = re.compile(r"[0-9a-f]{64}")
LINE_LENGTH = 100
"""Columns of generated code."""
PATTERN_CHUNK = 40
"""Blocks of a long pattern on one line."""


def template_context(spec: Spec, spec_sha256: str, flops_per_token: tuple[int, int]) -> dict[str, object]:
    """Return the variables of `templates/model.py.jinja` and `templates/train.py.jinja`.

    Raises N3CError (E0510) where a value is not what a validated spec would hold.
    """
    patterns = [spec.model.pattern] + ([spec.mtp.pattern] if spec.mtp else [])
    kinds = [kind for kind in KINDS if any(kind in pattern for pattern in patterns)]
    used = set(kinds)
    tables = {kind.table: _table(getattr(spec, kind.table), kind in used, kind.table) for kind in KINDS}
    tables["moe"] |= _moe_flags(spec.moe) if spec.moe else {}
    shared = MOE in used and spec.moe is not None and spec.moe.shared_intermediate_size > 0
    modules = [kind.template for kind in kinds if kind is not MLP]
    if shared or MLP in used:
        modules.insert(0, "mlp.jinja")  # the shared expert is an MLP, too
    shared_out = _shared_out(used, shared)
    imported = ["Config", "Model", *shared_out]
    if not spec.model.tie_word_embeddings:
        imported += ["head_loss", "sum_of_losses"]
    return {
        "name": _matching(NAME, spec.name, "name"),
        "sha256": _matching(SHA256, spec_sha256, "sha256"),
        "summary": _summary(spec, kinds),
        "flops_per_token": _literal(flops_per_token[0], "flops"),
        "flops_per_token_of_context": _literal(flops_per_token[1], "flops"),
        "legend": ", ".join(f"{kind.symbol} {kind.legend}" for kind in kinds),
        "kinds": kinds,
        "modules": modules,
        "formats": [(_matching(MODULE, name, "training"), format_) for name, format_ in training_formats(spec)],
        "one_dimensional": spec.training is not None and spec.training.block == (1, 16),
        "stateful": [kind.class_name for kind in kinds if kind.stateful],
        "uses": {
            "mamba": MAMBA in used,
            "attention": ATTENTION in used,
            "moe": MOE in used,
            "mtp": spec.mtp is not None,
        },
        "shared_out": shared_out,
        "imported": sorted(imported, key=lambda name: (not name.isupper(), name)),  # as isort
        "divided": _divided(used, shared),
        # What transformers lacks, in a model whose config it reads.
        "wrapped": (spec.mtp is not None or (MOE in used and not shared)) and all(k.in_transformers for k in kinds),
        "tied": spec.model.tie_word_embeddings,
        "rescale": spec.model.rescale_prenorm_residual,
        "hf_kinds": ", ".join(f'"{kind.symbol}": "{kind.hf_name}"' for kind in kinds),
        "model": _literals(spec.model, "model") | {"eos_token_id": _token_ids(spec.model.eos_token_ids)},
        "pattern_lines": _pattern_lines(spec.model.pattern),
        **tables,
        "mtp": _literals(spec.mtp, "mtp") if spec.mtp else {},
        "mtp_pattern_lines": _pattern_lines(spec.mtp.pattern) if spec.mtp else [],
    }


def _shared_out(used: Set[BlockKind], shared_expert: bool) -> list[str]:
    """Return the classes of model.py that tensor-parallel processes share out."""
    pairs = (
        ("Attention", ATTENTION in used),
        ("Experts", MOE in used),
        ("Mamba2", MAMBA in used),
        ("MLP", MLP in used or shared_expert),
    )
    return [name for name, there in pairs if there]


def _divided(used: Set[BlockKind], shared_expert: bool) -> list[str]:
    """Return the sizes of Config that tensor parallelism divides."""
    pairs = (
        ("attention_num_heads", ATTENTION in used),
        ("mamba_num_heads", MAMBA in used),
        ("mamba_n_groups", MAMBA in used),
        ("moe_intermediate_size", MOE in used),
        ("moe_shared_intermediate_size", shared_expert),
        ("mlp_intermediate_size", MLP in used),
    )
    return [name for name, there in pairs if there]


def _moe_flags(moe: Moe) -> dict[str, object]:
    return {
        "latent": moe.latent_size is not None,
        "shared": moe.shared_intermediate_size > 0,
        "grouped": moe.n_group > 1,
        "normalised": moe.norm_topk_prob,
    }


def _summary(spec: Spec, kinds: Sequence[BlockKind]) -> str:
    return ", ".join([kind.legend for kind in kinds] + (["multi-token prediction"] if spec.mtp else []))


def _table(table: object | None, used: bool, path: str) -> dict[str, object]:
    """Return the literals of a table that the spec uses; a table that it lacks is an error."""
    if not used:
        return {}
    if table is None:
        raise _refused(path, "a pattern uses this table, and the spec lacks it")
    return _literals(table, path)


def _literals(table: object, path: str) -> dict[str, object]:
    """Return each field of a spec table as the text of a Python literal."""
    names = [item.name for item in fields(table)]  # type: ignore[arg-type]
    return {name: _literal(getattr(table, name), f"{path}.{name}") for name in names}


def _literal(value: object, path: str) -> str:
    """Return a value as Python writes it. Types are compared exactly: a subclass may print anything."""
    if value is None or type(value) is bool:
        return repr(value)
    if type(value) is int:
        return f"{value:_}" if value >= 100_000 else f"{value}"
    if type(value) is float and math.isfinite(value):
        return re.sub(r"e\+?(-?)0*", r"e\1", repr(value))
    if type(value) is tuple:
        items = cast("tuple[object, ...]", value)
        return "[" + ", ".join(_literal(item, path) for item in items) + "]"
    if isinstance(value, Pattern):
        return _symbols(value, path)
    raise _refused(path, f"{value!r} cannot stand in generated code")


def _symbols(pattern: Pattern, path: str) -> str:
    if type(pattern.symbols) is not str or not pattern.symbols or not set(pattern.symbols) <= BY_SYMBOL.keys():
        raise _refused(path, f"{pattern.symbols!r} is not made of the symbols {' '.join(sorted(BY_SYMBOL))}")
    return f'"{pattern.symbols}"'


def _token_ids(ids: tuple[int, ...]) -> str:
    """Return one id as a number, several as a list and none as None, as Hugging Face has it."""
    if len(ids) < 2:
        return _literal(ids[0] if ids else None, "model.eos_token_ids")
    text = _literal(ids, "model.eos_token_ids")
    indent = " " * 8
    if len(indent) + len('"eos_token_id": ,') + len(text) <= LINE_LENGTH:
        return text
    return "[\n" + "".join(f"{indent}    {item},\n" for item in text[1:-1].split(", ")) + indent + "]"


def _pattern_lines(pattern: Pattern) -> list[Mapping[str, object]]:
    """Return a pattern as one literal, or, where that is long, as literals of PATTERN_CHUNK blocks."""
    symbols = pattern.symbols
    _symbols(pattern, "pattern")
    size = PATTERN_CHUNK if len(symbols) > 64 else len(symbols)
    lines: list[Mapping[str, object]] = []
    for first in range(0, len(symbols), size):
        chunk = symbols[first : first + size]
        lines.append({"text": f'"{chunk}"', "first": first, "last": first + len(chunk) - 1})
    return lines


def _matching(form: re.Pattern[str], text: str, path: str) -> str:
    if type(text) is not str or not form.fullmatch(text):
        raise _refused(path, f"{text!r} is not of the form {form.pattern}")
    return text


def _refused(path: str, why: str) -> N3CError:
    return N3CError(Diagnostic("E0510", f"no code can be generated from `{path}`: {why}"), ExitCode.SPEC)
