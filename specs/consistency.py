"""Checks between the keys of a spec. Each looks only at values that could be read."""

from __future__ import annotations

from collections.abc import Container

from .block_kind import Say, Values
from .blocks import MOE, MoeLayers
from .kinds import kinds
from .layer_tables import PER_LAYER, given_keys, selected_blocks
from .pattern import Pattern


def check(values: Values, tables: Container[str], say: Say) -> None:
    """Report every contradiction of a spec.

    `tables` are those of the spec. `values` maps dotted paths to the values that are good by
    themselves, defaults included; a key that is missing or bad is absent, and the checks that need
    it are left out.
    """
    _check_tables(values, tables, say)
    for kind in kinds():
        if kind.contradictions is not None:
            kind.contradictions(values, say)
    _check_layers(values, say)
    _check_mtp(values, say)
    _check_tokens(values, say)
    _check_serving(values, say)


def _check_tables(values: Values, tables: Container[str], say: Say) -> None:
    main: Pattern | None = values.get("model.pattern")
    mtp: Pattern | None = values.get("mtp.pattern")
    for kind in kinds():
        table, words = kind.table, f"{kind.title} blocks (`{kind.symbol}`)"
        needed_by = next(
            (path for path, pattern in (("model.pattern", main), ("mtp.pattern", mtp)) if pattern and kind in pattern),
            None,
        )
        if needed_by and table not in tables:
            advice = f"add [{table}]; `n3c schema` documents its keys"
            say(needed_by, "E0201", f"the pattern has {words} but [{table}] is missing", advice)
        elif table in tables and not needed_by and main is not None:
            say(table, "W0201", f"[{table}] is ignored: no pattern has {words}", None)


def _check_layers(values: Values, say: Say) -> None:
    """Report entries of [[moe.layers]] that select no MoE block, change nothing, or contradict [moe]."""
    entries: tuple[MoeLayers, ...] = values.get("moe.layers", ())
    main: Pattern | None = values.get("model.pattern")
    mtp: Pattern | None = values.get("mtp.pattern")
    if main is None:
        return
    blocks = (*main, *(mtp or ()))
    for index, entry in enumerate(entries):
        path = f"moe.layers.{index}"
        given = {f"moe.{key}": value for key, value in given_keys(entry).items()}
        try:
            selected = selected_blocks(entry.layers, main, len(blocks))
        except ValueError as error:
            say(f"{path}.layers", "E0110", f"`layers`: {error}", None)
            continue
        if not any(blocks[block] is MOE for block in selected):
            say(f"{path}.layers", "E0110", f"`{entry.layers}` selects no MoE block", None)
        if not given:
            say(path, "E0112", "the entry changes nothing", f"it may give {', '.join(f'`{key}`' for key in PER_LAYER)}")
        if "moe.shared_intermediate_size" in given and values.get("moe.shared_intermediate_size") == 0:
            message = "`shared_intermediate_size` of an entry, but [moe] has no shared expert"
            say(f"{path}.shared_intermediate_size", "E0217", message, "all MoE blocks have one, or none has")
        _check_entry(values, given, path, say)


def _check_entry(values: Values, given: Values, path: str, say: Say) -> None:
    """Report what the keys of an entry contradict in the table that they change."""

    def say_of_entry(place: str, code: str, message: str, advice: str | None) -> None:
        if place in given:
            say(f"{path}.{place.removeprefix('moe.')}", code, message, advice)

    if MOE.contradictions is not None:
        MOE.contradictions({**values, **given}, say_of_entry)


def _check_mtp(values: Values, say: Say) -> None:
    pattern: Pattern | None = values.get("mtp.pattern")
    if pattern is None:
        return
    wrong = [kind.symbol for kind in kinds() if kind in pattern and not kind.in_mtp]
    if wrong:
        allowed = " and ".join(f"{kind.title} (`{kind.symbol}`)" for kind in kinds() if kind.in_mtp)
        message = f"an MTP pattern has {allowed} blocks only, not `{'`, `'.join(wrong)}`"
        say("mtp.pattern", "E0211", message, "vLLM and SGLang accept no others; a drafter has no recurrent state")
    if pattern.stages:
        say("mtp.pattern", "E0211", "an MTP pattern has no pipeline cuts `|`", None)


def _check_tokens(values: Values, say: Say) -> None:
    rows = values.get("model.vocab_size")
    if rows is None:
        return
    tokens = [(f"model.{name}", values.get(f"model.{name}")) for name in ("pad_token_id", "bos_token_id")]
    ends: tuple[int, ...] = values.get("model.eos_token_ids", ())
    tokens += [(f"model.eos_token_ids.{index}", token) for index, token in enumerate(ends)]
    for path, token in tokens:
        if token is not None and token >= rows:
            say(path, "E0212", f"token {token} is outside `vocab_size` {rows}", None)


def _check_serving(values: Values, say: Say) -> None:
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
