"""The variables of the templates: every value of a spec, resolved to a Python literal or a flag.

Spec text never reaches generated code as it is. Strings are checked against the form that they
must have, numbers are written from their value, and anything else is refused.
"""

from __future__ import annotations

import keyword
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError
from n3c.specs.block_kind import BlockKind
from n3c.specs.blocks import ATTENTION, GENERAL_LETTERS, MAMBA, MLP, MOE, Moe
from n3c.specs.kinds import by_symbol, kinds
from n3c.specs.layer_tables import PER_LAYER, moe_of_block
from n3c.specs.pattern import Pattern
from n3c.specs.reader import entry_class, fields_of
from n3c.specs.schema import Spec

from .gpus import peak_tflops
from .imports import import_order, model_imports
from .numerics import training_formats

MODULE = re.compile(r"[a-z_]+(\.[a-z0-9_]+)*")
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,79}")
SHA256 = re.compile(r"[0-9a-f]{64}")
LINE_LENGTH = 100
"""Columns of generated code."""
PATTERN_CHUNK = 40
"""Blocks of a long pattern on one line."""
IMPORTED = {"torch", "safetensors", "numpy", "transformers", "transformer_engine", "torchtitan", "megatron", "train"}
"""Names that a package must not have: the generated code, or a library that it needs, imports them."""

Literals = Mapping[str, str]
"""Key of a spec's table → the text of its value in Python."""


@dataclass(frozen=True, slots=True)
class Uses:
    """Which block kinds, and whether MTP, the patterns of a spec use."""

    mamba: bool
    moe: bool
    attention: bool
    mlp: bool
    mtp: bool


@dataclass(frozen=True, slots=True)
class MoeParts:
    """Which parts an MoE block has."""

    latent: bool
    shared: bool
    grouped: bool
    normalised: bool


@dataclass(frozen=True, slots=True)
class MoeLayer:
    """The sizes of an MoE block that differs from the others."""

    block: int
    """Blocks of MTP count on from the trunk's."""
    sizes: Literals
    """Of each key that any block changes."""


@dataclass(frozen=True, slots=True)
class PatternLine:
    """A piece of a pattern: a string literal, and the first and last block in it."""

    text: str
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class ParallelView:
    """The classes and sizes that tensor parallelism divides."""

    classes: tuple[str, ...]
    """Classes of model.py that processes share out."""
    sizes: tuple[str, ...]
    """Fields of Config."""
    imported: tuple[str, ...]
    """Names that parallelize.py imports from model.py."""


@dataclass(frozen=True, slots=True)
class SpecView:
    """The variables of every template, by the names that these use."""

    name: str
    package: str
    sha256: str
    summary: str
    legend: str
    letters: tuple[str, ...]
    """Lines of the table of letters."""
    uses: Uses
    blocks: tuple[BlockKind, ...]
    mixers: tuple[str, ...]
    """Templates of the mixers; the MLP is one also where only shared experts use it."""
    stateful: tuple[str, ...]
    """Classes of the mixers with a state."""
    plain: tuple[str, ...]
    """Classes of the mixers that map x to a tensor, and read nothing else."""
    tied: bool
    rescale: bool
    conv_bias: bool
    in_transformers: bool
    wrapped: bool
    """Whether modeling_n3c.py is written: transformers' nemotron_h has the model, but lacks something of it."""
    remote_code: tuple[str, ...]
    model: Literals
    tables: Mapping[str, Literals]
    """Of each block kind that the spec uses, by the name of its table."""
    moe_parts: MoeParts | None
    moe_layers: tuple[MoeLayer, ...]
    mtp: Literals
    pattern_lines: tuple[PatternLine, ...]
    mtp_pattern_lines: tuple[PatternLine, ...]
    formats: tuple[tuple[str, str], ...]
    """(module, format) of [training]."""
    one_dimensional: bool
    parallel: ParallelView
    files: tuple[str, ...]
    """Files of the package that not every model has: those of its block kinds."""
    imports: tuple[tuple[str, tuple[str, ...]], ...]
    """(module of the package, names that model.py imports from it)."""
    roles: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]
    """(symbol of a block kind, (module of its mixer, role) of each)."""
    peak_tflops: tuple[tuple[str, str], ...]
    """(words of a GPU's name, dense BF16 TFLOP/s)."""
    flops_per_token: str
    flops_per_token_of_context: str


def spec_view(spec: Spec, spec_sha256: str, flops_per_token: tuple[int, int]) -> SpecView:
    """Return the variables of the templates.

    Raises N3CError (E0510) where a value is not what a validated spec would hold.
    """
    patterns = [spec.model.pattern] + ([spec.mtp.pattern] if spec.mtp else [])
    blocks = tuple(kind for kind in kinds() if any(kind in pattern for pattern in patterns))
    uses = Uses(
        mamba=MAMBA in blocks,
        moe=MOE in blocks,
        attention=ATTENTION in blocks,
        mlp=MLP in blocks,
        mtp=spec.mtp is not None,
    )
    tables = {kind.table: _table(spec.table(kind), kind.table) for kind in blocks}
    moe = _moe_parts(spec.moe) if uses.moe and spec.moe is not None else None
    shared = moe is not None and moe.shared
    layers = _moe_layers(spec)
    in_transformers = all(kind.in_transformers for kind in blocks)
    mixers = tuple(kind.template for kind in kinds() if kind in blocks or (shared and kind is MLP))
    return SpecView(
        name=_matching(NAME, spec.name, "name"),
        package=package_name(spec),
        sha256=_matching(SHA256, spec_sha256, "sha256"),
        summary=", ".join([b.legend for b in blocks] + (["multi-token prediction"] if spec.mtp else [])),
        legend=", ".join(f"{block.symbol} {block.legend}" for block in blocks),
        letters=_letters(blocks, shared),
        uses=uses,
        blocks=blocks,
        mixers=mixers,
        stateful=tuple(block.class_name for block in blocks if block.stateful),
        plain=tuple(block.class_name for block in blocks if not block.stateful and block is not MOE),
        tied=spec.model.tie_word_embeddings,
        rescale=spec.model.rescale_prenorm_residual,
        conv_bias=uses.mamba and tables["mamba"]["conv_bias"] == "True",
        in_transformers=in_transformers,
        wrapped=(uses.mtp or (uses.moe and not shared)) and not layers and in_transformers,
        remote_code=_remote_code(blocks),
        model={**_literals(spec.model, "model"), "eos_token_id": _token_ids(spec.model.eos_token_ids)},
        tables=tables,
        moe_parts=moe,
        moe_layers=layers,
        mtp=_literals(spec.mtp, "mtp") if spec.mtp else {},
        pattern_lines=_pattern_lines(spec.model.pattern),
        mtp_pattern_lines=_pattern_lines(spec.mtp.pattern) if spec.mtp else (),
        formats=tuple((_matching(MODULE, name, "training"), format_) for name, format_ in training_formats(spec)),
        one_dimensional=spec.training is not None and spec.training.block == (1, 16),
        parallel=_parallel(uses, shared),
        files=tuple(dict.fromkeys(name for kind in blocks for name in kind.files)),
        imports=model_imports(blocks, mtp=uses.mtp),
        roles=_roles(spec, blocks),
        peak_tflops=tuple((words, _literal(tflops, "gpus")) for words, tflops in peak_tflops()),
        flops_per_token=_literal(flops_per_token[0], "flops"),
        flops_per_token_of_context=_literal(flops_per_token[1], "flops"),
    )


def package_name(spec: Spec) -> str:
    """Return the name of the generated package: that of the spec, as a Python identifier.

    Raises N3CError (E0510) where Python, or a library that the code needs, has that name for something else.
    """
    name = re.sub(r"[^a-z0-9]", "_", _matching(NAME, spec.name, "name"))
    name = f"m_{name}" if name[0].isdigit() else name
    if keyword.iskeyword(name) or name in IMPORTED or name in sys.stdlib_module_names:
        raise _refused("name", f"a package `{name}` would hide Python's own, or a library's, of that name")
    return name


def _remote_code(blocks: Sequence[BlockKind]) -> tuple[str, ...]:
    """Return modeling_n3c.py and what it imports, directly or not."""
    files = {"dispatch.py", "float32.py", "loss.py", "model.py", "modeling_n3c.py", "norm.py"}
    files |= {"recompute.py", "sequences.py", "state.py", *(name for kind in blocks for name in kind.files)}
    return tuple(sorted(files | ({"callbacks.py"} if MOE in blocks else set())))


def _letters(blocks: Sequence[BlockKind], shared: bool) -> tuple[str, ...]:
    """Return the table of letters for the kinds that a model has, filled into lines."""
    lines: list[str] = []
    for title, letters in [("", GENERAL_LETTERS), *((kind.legend, kind.letters) for kind in blocks if kind.letters)]:
        parts = [f"{letter} {meaning}" for letter, meaning in letters.items() if letter != "U" or shared]
        line = f"{title}: {parts[0]}" if title else parts[0]
        for part in parts[1:]:
            if len(line) + len(", ") + len(part) + len(",") > LINE_LENGTH - 4:
                lines.append(f"{line},")
                line = f"    {part}"
            else:
                line += f", {part}"
        lines.append(line)
    return tuple(lines)


def _parallel(uses: Uses, shared: bool) -> ParallelView:
    classes = {
        "Attention": uses.attention,
        "Experts": uses.moe,
        "Mamba2": uses.mamba,
        "MLP": uses.mlp or shared,
    }
    sizes = {
        "attention_num_heads": uses.attention,
        "mamba_num_heads": uses.mamba,
        "mamba_n_groups": uses.mamba,
        "moe_intermediate_size": uses.moe,
        "moe_shared_intermediate_size": shared,
        "mlp_intermediate_size": uses.mlp,
    }
    names = tuple(name for name, used in classes.items() if used)
    imported = sorted(["Config", "Model", *names], key=import_order)
    return ParallelView(names, tuple(name for name, used in sizes.items() if used), tuple(imported))


def _roles(spec: Spec, blocks: Sequence[BlockKind]) -> tuple[tuple[str, tuple[tuple[str, str], ...]], ...]:
    """Return the roles of every weight that the mixers have, kind by kind; stacked experts are one module."""
    modules = {kind: [m for m, _ in kind.present(spec.table(kind))] for kind in blocks}
    named = {kind: [(m.name.replace(".{}", ""), m.role) for m in found] for kind, found in modules.items()}
    return tuple((kind.symbol, (*named[kind], *kind.vectors.items())) for kind in blocks)


def _moe_parts(moe: Moe) -> MoeParts:
    return MoeParts(
        latent=moe.latent_size is not None,
        shared=moe.shared_intermediate_size > 0,
        grouped=moe.n_group > 1,
        normalised=moe.norm_topk_prob,
    )


def _moe_layers(spec: Spec) -> tuple[MoeLayer, ...]:
    """Return the MoE blocks whose sizes are not those of [moe]."""
    if spec.moe is None or not spec.moe.layers:
        return ()
    changed = [key for key in PER_LAYER if any(getattr(entry, key) is not None for entry in spec.moe.layers)]
    usual = _literals(spec.moe, "moe")
    found: list[MoeLayer] = []
    for block, kind in enumerate(spec.blocks):
        sizes = _literals(moe_of_block(spec, block), f"moe of block {block}") if kind is MOE else usual
        if sizes != usual:
            found.append(MoeLayer(block, {key: sizes[key] for key in changed}))
    return tuple(found)


def _table(table: object | None, path: str) -> Literals:
    """Return the literals of a table that the spec uses; a table that it lacks is an error."""
    if table is None:
        raise _refused(path, "a pattern uses this table, and the spec lacks it")
    return _literals(table, path)


def _literals(table: object, path: str) -> Literals:
    """Return each field of a spec table as the text of a Python literal, without arrays of tables."""
    names = [name for name, (hint, _, _) in fields_of(type(table)).items() if entry_class(hint) is None]
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
    if type(pattern.symbols) is not str or not pattern.symbols or not set(pattern.symbols) <= set(by_symbol()):
        raise _refused(path, f"{pattern.symbols!r} is not made of the symbols {' '.join(sorted(by_symbol()))}")
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


def _pattern_lines(pattern: Pattern) -> tuple[PatternLine, ...]:
    """Return a pattern as one literal, or, where that is long, as literals of PATTERN_CHUNK blocks."""
    symbols = pattern.symbols
    _symbols(pattern, "pattern")
    size = PATTERN_CHUNK if len(symbols) > 64 else len(symbols)
    pieces = [(first, symbols[first : first + size]) for first in range(0, len(symbols), size)]
    return tuple(PatternLine(f'"{piece}"', first, first + len(piece) - 1) for first, piece in pieces)


def _matching(form: re.Pattern[str], text: str, path: str) -> str:
    if type(text) is not str or not form.fullmatch(text):
        raise _refused(path, f"{text!r} is not of the form {form.pattern}")
    return text


def _refused(path: str, why: str) -> N3CError:
    return N3CError(Diagnostic("E0510", f"no code can be generated from `{path}`: {why}"), ExitCode.SPEC)
