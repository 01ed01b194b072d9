# ruff: noqa: RUF009  (`key` makes a dataclass field)
"""The spec, as frozen dataclasses. They are the schema: loader, JSON Schema and docs derive from them.

Each field is declared with `key(...)`: its documentation, its bounds and its default. A field
without a default is required. The names and their meaning are a contract with users. The tables of
the block kinds stand in `blocks`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from n3c.ir.diagnostics import Span

from .block_kind import BlockKind
from .blocks import LEGEND, Attention, Mamba, Mlp, Moe
from .keys import COUNT, LAYERS, LENGTH, WIDTH, key
from .pattern import Pattern

Format = Literal["nvfp4", "w4a16_nvfp4", "fp8", "bf16"]
"""Deployment format of a linear's weight: W4A4 NVFP4, weight-only NVFP4, per-tensor FP8, BF16."""

TrainingFormat = Literal["nvfp4", "mxfp8", "bf16"]

BLOCKS = ((16, 16), (1, 16))
"""Weight blocks of NVFP4: two-dimensional (arXiv 2509.25149), and one-dimensional."""

NAME = r"[a-z0-9][a-z0-9._-]{0,79}"
PASS = r"[a-z][a-z0-9_]{0,79}"
MODULE = r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z0-9_]+)*"


@dataclass(frozen=True)
class Model:
    """[model]: the residual stream, embedding and head."""

    hidden_size: int = key("Width of the residual stream.", minimum=1, maximum=WIDTH)
    vocab_size: int = key("Rows of the embedding and of the head.", minimum=1, maximum=1 << 24)
    pattern: Pattern = key(f"One symbol a residual block: {LEGEND}; groups repeat, `(ME)4`.")
    max_position_embeddings: int = key("Longest context, in tokens.", default=4096, minimum=1, maximum=LENGTH)
    norm_eps: float = key("Epsilon of every RMSNorm.", default=1e-5, above=0)
    tie_word_embeddings: bool = key("Whether the head is the embedding.", default=False)
    initializer_range: float = key("Standard deviation of fresh weights.", default=0.02, above=0)
    rescale_prenorm_residual: bool = key("Scale fresh Mamba out_proj weights by 1/sqrt(layers).", default=True)
    pad_token_id: int | None = key("Padding token; leave out for none.", default=None, minimum=0, maximum=LENGTH)
    bos_token_id: int | None = key(
        "Token that begins a sequence; leave out for none.", default=None, minimum=0, maximum=LENGTH
    )
    eos_token_ids: tuple[int, ...] = key("Tokens that end a sequence.", default=(), minimum=0, maximum=LENGTH)


@dataclass(frozen=True)
class Mtp:
    """[mtp]: multi-token prediction; one set of weights, applied `depth` times."""

    pattern: Pattern = key("Blocks of one prediction step.")
    depth: int = key("Prediction steps.", default=1, minimum=1, maximum=64)
    loss_scaling_factor: float = key("Weight of the MTP loss, averaged over depths.", default=0.1, minimum=0)


@dataclass(frozen=True)
class Rule:
    """One rule: the weights it selects (roles in layers, or exact modules) and their format."""

    format: str = key("Format of the selected weights.")
    roles: tuple[str, ...] = key("Role globs, as `attention.*`.", default=())
    layers: str = key('"all", "3", "3..9", "first N", "last N", "before attention".', default="all", regex=LAYERS)
    modules: tuple[str, ...] = key("Exact module names of the checkpoint, instead of roles.", default=(), regex=MODULE)
    block: tuple[int, int] | None = key(
        "Weight block of this rule; else that of the table.", default=None, choices=BLOCKS
    )


@dataclass(frozen=True)
class Quantization:
    """[quantization]: formats of the deployed checkpoint and engine; the last matching rule decides."""

    format: Format = key("Format of every linear that no rule names.")
    block: tuple[int, int] = key("Weight blocks of NVFP4: [16, 16] or [1, 16].", default=(16, 16), choices=BLOCKS)
    rules: tuple[Rule, ...] = key("Exceptions, top-down.", default=())


@dataclass(frozen=True)
class Training:
    """[training]: numerics of training; rules of the same form."""

    format: TrainingFormat = key("Format of every linear that no rule names.")
    block: tuple[int, int] = key("Weight blocks of NVFP4.", default=(16, 16), choices=BLOCKS)
    rules: tuple[Rule, ...] = key("Exceptions, top-down.", default=())


@dataclass(frozen=True)
class Serving:
    """[serving]: batch sizes, lengths and state types of plans."""

    batch_sizes: tuple[int, ...] = key("One static decode plan each.", default=(1,), minimum=1, maximum=COUNT)
    max_seq_len: int = key(
        "Capacity of the KV cache, in tokens; by default no more than the model allows.",
        default=8192,
        minimum=1,
        maximum=LENGTH,
    )
    prefill_chunk: int = key("Tokens of a prefill chunk.", default=256, minimum=1, maximum=LENGTH)
    draft_tokens: int = key("Tokens drafted a step.", default=3, minimum=0, maximum=64)
    kv_cache_dtype: Literal["bf16", "fp8", "fp32"] = key("Type of the KV cache.", default="bf16")
    ssm_state_dtype: Literal["fp32", "fp16", "bf16"] = key("Type of the SSM state.", default="fp32")
    conv_state_dtype: Literal["bf16", "fp32"] = key("Type of the convolution window.", default="bf16")
    activations: Literal["as_format", "weight_only"] = key(
        "Whether nvfp4 and fp8 quantize what their linears read, in every entry point, or weights only.",
        default="as_format",
    )
    passes: tuple[str, ...] | None = key(
        "Passes of installed extensions that run, too; `n3c passes` lists them.", default=None, regex=PASS
    )


@dataclass(frozen=True)
class Spec:
    """A whole architecture spec. Sizes are in elements, lengths in tokens."""

    name: str = key(f"Name of the model: {NAME}.", regex=NAME)
    model: Model = key("The residual stream.")
    schema: Literal[1] = key("Version of this schema.", default=1)
    mamba: Mamba | None = key("Required where the pattern has M.", default=None)
    attention: Attention | None = key("Required where a pattern has *.", default=None)
    moe: Moe | None = key("Required where a pattern has E.", default=None)
    mlp: Mlp | None = key("Required where the pattern has -.", default=None)
    mtp: Mtp | None = key("Multi-token prediction; leave out for none.", default=None)
    quantization: Quantization | None = key("Formats of deployment; leave out for BF16.", default=None)
    training: Training | None = key("Numerics of training; leave out for BF16.", default=None)
    serving: Serving = key("What the plans are made for.", default=Serving())
    tables: Mapping[str, Any] = field(default_factory=dict[str, Any], hash=False)
    """Tables of block kinds that have no field above, by name: those of extensions."""
    spans: Mapping[str, Span] = field(default_factory=dict[str, Span], compare=False, repr=False)
    """Key path (`model.pattern`, `quantization.rules.2`) → where the spec says it."""

    @property
    def blocks(self) -> tuple[BlockKind, ...]:
        """The kind of each block: those of the trunk, then those of one prediction step."""
        return self.model.pattern.kinds + (self.mtp.pattern.kinds if self.mtp else ())

    def table(self, kind: BlockKind) -> Any:
        """Return the table of a block kind, a `kind.table_class`; None where the spec has no such blocks."""
        return self.section(kind.table)

    def section(self, name: str) -> Any:
        """Return what the spec has under a name at its top level: a table, or None."""
        return getattr(self, name) if name in OWN_TABLES else self.tables.get(name)

    def span(self, path: str) -> Span | None:
        """Return the place of `path`, or of its nearest parent that the spec spells out."""
        while path and path not in self.spans:
            path = path.rpartition(".")[0]
        return self.spans.get(path)


OWN_TABLES = frozenset(item.name for item in fields(Spec) if item.name not in ("tables", "spans"))
"""What a spec has at its top level without extensions."""
