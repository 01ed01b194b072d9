"""What the keys of a spec say of each other. Every check looks only at values that could be read."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Any

from .pattern import BlockKind, Pattern

Say = Callable[[str, str, str, str | None], None]
"""`say(path, code, message, advice)`: report about the value, or the table, at a dotted path."""

_TABLE_OF = {
    BlockKind.MAMBA: ("mamba", "Mamba-2"),
    BlockKind.ATTENTION: ("attention", "attention"),
    BlockKind.MOE: ("moe", "MoE"),
    BlockKind.MLP: ("mlp", "MLP"),
}


def check(values: Mapping[str, Any], tables: Container[str], say: Say) -> None:
    """Report every contradiction of a spec.

    `tables` are those of the spec. `values` maps dotted paths to the values that are good by
    themselves, defaults included; a key that is missing or bad is absent, and the checks that need
    it are left out.
    """
    _check_tables(values, tables, say)
    _check_mamba(values, say)
    _check_attention(values, say)
    _check_router(values, say)
    _check_mtp(values, say)
    _check_tokens(values, say)
    _check_serving(values, say)


def _check_tables(values: Mapping[str, Any], tables: Container[str], say: Say) -> None:
    main: Pattern | None = values.get("model.pattern")
    mtp: Pattern | None = values.get("mtp.pattern")
    for kind, (table, words) in _TABLE_OF.items():
        needed_by = next(
            (path for path, pattern in (("model.pattern", main), ("mtp.pattern", mtp)) if pattern and kind in pattern),
            None,
        )
        if needed_by and table not in tables:
            advice = f"add [{table}]; `n3c schema` documents its keys"
            say(needed_by, "E0201", f"the pattern has {words} blocks (`{kind.value}`) but [{table}] is missing", advice)
        elif table in tables and not needed_by and main is not None:
            say(table, "W0201", f"[{table}] is ignored: no pattern has {words} blocks (`{kind.value}`)", None)


def _check_mamba(values: Mapping[str, Any], say: Say) -> None:
    heads, groups = values.get("mamba.num_heads"), values.get("mamba.n_groups")
    if heads and groups and heads % groups:
        # The inner width, heads * head_dim, is then a multiple of the groups as the gated norm needs.
        say("mamba.num_heads", "E0202", f"`num_heads` {heads} is not a multiple of `n_groups` {groups}", None)
    _check_width("mamba", values, say)
    low, high = values.get("mamba.time_step_min"), values.get("mamba.time_step_max")
    if low and high and low > high:
        say("mamba.time_step_min", "E0203", f"`time_step_min` {low} is more than `time_step_max` {high}", None)


def _check_attention(values: Mapping[str, Any], say: Say) -> None:
    heads, shared = values.get("attention.num_heads"), values.get("attention.num_kv_heads")
    if heads and shared and heads % shared:
        message = f"`num_heads` {heads} is not a multiple of `num_kv_heads` {shared}"
        say("attention.num_heads", "E0204", message, "each key and value head serves equally many query heads")
    _check_width("attention", values, say)


def _check_width(table: str, values: Mapping[str, Any], say: Say) -> None:
    heads, head_dim = values.get(f"{table}.num_heads"), values.get(f"{table}.head_dim")
    if heads and head_dim and heads * head_dim > 1 << 24:
        message = f"`num_heads` * `head_dim` is {heads * head_dim}, more than {1 << 24}"
        say(f"{table}.num_heads", "E0205", message, None)


def _check_router(values: Mapping[str, Any], say: Say) -> None:
    experts, top_k = values.get("moe.num_experts"), values.get("moe.top_k")
    groups, chosen = values.get("moe.n_group"), values.get("moe.topk_group")
    if experts and top_k and top_k > experts:
        say("moe.top_k", "E0206", f"`top_k` {top_k} is more than `num_experts` {experts}", None)
    if groups and chosen and chosen > groups:
        say("moe.topk_group", "E0207", f"`topk_group` {chosen} is more than `n_group` {groups}", None)
    if not experts or not groups:
        return
    if experts % groups:
        say("moe.num_experts", "E0208", f"`num_experts` {experts} is not a multiple of `n_group` {groups}", None)
    elif groups > 1 and experts // groups < 2:
        advice = "a group is ranked by the sum of its two best scores"
        say("moe.n_group", "E0209", f"{groups} groups of {experts} experts: a group needs two or more", advice)
    elif chosen and top_k and chosen <= groups and experts // groups * chosen < top_k <= experts:
        allowed = experts // groups * chosen
        message = f"`top_k` {top_k} is more than the {allowed} experts that `topk_group` {chosen} leaves"
        say("moe.top_k", "E0210", message, None)


def _check_mtp(values: Mapping[str, Any], say: Say) -> None:
    pattern: Pattern | None = values.get("mtp.pattern")
    if pattern is None:
        return
    wrong = [kind.value for kind in (BlockKind.MAMBA, BlockKind.MLP) if kind in pattern]
    if wrong:
        message = f"an MTP pattern has attention (`*`) and MoE (`E`) blocks only, not `{'`, `'.join(wrong)}`"
        say("mtp.pattern", "E0211", message, "vLLM and SGLang accept no others; a drafter has no recurrent state")
    if pattern.stages:
        say("mtp.pattern", "E0211", "an MTP pattern has no pipeline cuts `|`", None)


def _check_tokens(values: Mapping[str, Any], say: Say) -> None:
    rows = values.get("model.vocab_size")
    if rows is None:
        return
    tokens = [(f"model.{name}", values.get(f"model.{name}")) for name in ("pad_token_id", "bos_token_id")]
    ends: tuple[int, ...] = values.get("model.eos_token_ids", ())
    tokens += [(f"model.eos_token_ids.{index}", token) for index, token in enumerate(ends)]
    for path, token in tokens:
        if token is not None and token >= rows:
            say(path, "E0212", f"token {token} is outside `vocab_size` {rows}", None)


def _check_serving(values: Mapping[str, Any], say: Say) -> None:
    length, longest = values.get("serving.max_seq_len"), values.get("model.max_position_embeddings")
    if length and longest and length > longest:
        message = f"`max_seq_len` {length} is more than `max_position_embeddings` {longest}"
        say("serving.max_seq_len", "E0213", message, None)
    chunk = values.get("serving.prefill_chunk")
    if chunk and length and chunk > length:
        message = f"`prefill_chunk` {chunk} is more than `max_seq_len` {length}"
        say("serving.prefill_chunk", "E0215", message, None)
    sizes: tuple[int, ...] = values.get("serving.batch_sizes", (1,))
    if not sizes:
        say("serving.batch_sizes", "E0216", "`batch_sizes` is empty: a decode plan has a batch size", None)
    for index, size in enumerate(sizes):
        if size in sizes[:index]:
            say(f"serving.batch_sizes.{index}", "E0214", f"`batch_sizes` has {size} twice", None)
