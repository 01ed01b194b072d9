"""Hypothesis strategies for small random specs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from n3c.specs.block_kind import BlockKind
from n3c.specs.blocks import ATTENTION, MAMBA, MLP, MOE
from n3c.specs.dump import toml_value
from n3c.specs.load import parse_spec
from n3c.specs.schema import Spec

Sizes = st.SearchStrategy[int]
Table = dict[str, Any]


@st.composite
def _mamba(draw: st.DrawFn, sizes: Sizes) -> Table:
    groups = draw(st.integers(1, 4))
    low = draw(st.floats(1e-6, 1))
    return {
        "num_heads": groups * draw(st.integers(1, 4)),
        "head_dim": draw(sizes),
        "state_size": draw(sizes),
        "n_groups": groups,
        "conv_kernel": draw(st.integers(2, 6)),
        "chunk_size": draw(st.integers(1, 96)),
        "conv_bias": draw(st.booleans()),
        "time_step_min": low,
        "time_step_max": low * draw(st.integers(1, 9)),
        "time_step_floor": draw(st.floats(1e-9, 1)),
    }


@st.composite
def _attention(draw: st.DrawFn, sizes: Sizes) -> Table:
    shared = draw(st.integers(1, 4))
    return {"num_heads": shared * draw(st.integers(1, 4)), "num_kv_heads": shared, "head_dim": draw(sizes)}


@st.composite
def _moe(draw: st.DrawFn, sizes: Sizes) -> Table:
    groups = draw(st.integers(1, 4))
    in_group = draw(st.integers(2, 6))
    chosen = draw(st.integers(1, groups))
    return {
        "num_experts": groups * in_group,
        "top_k": draw(st.integers(1, chosen * in_group)),
        "intermediate_size": draw(sizes),
        "shared_intermediate_size": draw(st.integers(0, 96)),
        "routed_scaling_factor": draw(st.floats(0.01, 100)),
        "norm_topk_prob": draw(st.booleans()),
        "n_group": groups,
        "topk_group": chosen,
        **draw(st.fixed_dictionaries({}, optional={"latent_size": sizes})),
    }


@st.composite
def _moe_layers(draw: st.DrawFn, moe: Table, main: str, mtp: str, sizes: Sizes) -> Table:
    layers = [str(layer) for layer, symbol in enumerate(main) if symbol == MOE.symbol]
    selectors = [*layers, *(f"{layer}..{len(main) - 1}" for layer in layers)] + ["mtp"] * (MOE.symbol in mtp)
    allowed = moe["num_experts"] // moe["n_group"] * moe["topk_group"]
    shared = {"shared_intermediate_size": st.integers(1, 96)} if moe["shared_intermediate_size"] else {}
    keys = {"top_k": st.integers(1, allowed), "intermediate_size": sizes, **shared}
    chosen = draw(st.fixed_dictionaries({}, optional=keys).filter(bool))
    return {"layers": draw(st.sampled_from(selectors)), **chosen}


def _mlp(sizes: Sizes) -> st.SearchStrategy[Table]:
    return st.fixed_dictionaries({"intermediate_size": sizes})


BLOCK_TABLES: dict[BlockKind, Callable[[Sizes], st.SearchStrategy[Table]]] = {
    MAMBA: _mamba,
    ATTENTION: _attention,
    MOE: _moe,
    MLP: _mlp,
}
"""How the table of each block kind is drawn, from a strategy for widths."""


@st.composite
def spec_texts(draw: st.DrawFn, narrowest: int = 1) -> str:
    """Draw the TOML text of a valid small spec: every kind of block, odd sizes, rules, MTP.

    `narrowest` is the least width of anything, in channels.
    """
    sizes = st.integers(narrowest, 96)
    symbols = draw(st.text([kind.symbol for kind in BLOCK_TABLES], min_size=1, max_size=8))
    cuts = draw(st.lists(st.integers(0, len(symbols)), max_size=2).map(sorted))
    text = symbols
    for cut in reversed(cuts):
        text = text[:cut] + "|" + text[cut:]
    mtp = draw(st.none() | st.text([kind.symbol for kind in BLOCK_TABLES if kind.in_mtp], min_size=1, max_size=3))
    used = symbols + (mtp or "")
    vocabulary = draw(st.integers(2, 300))
    token = st.integers(0, vocabulary - 1)
    longest = draw(st.integers(1, 10_000))
    tables: dict[str, Table] = {
        "model": {
            "hidden_size": draw(sizes),
            "vocab_size": vocabulary,
            "pattern": text,
            "max_position_embeddings": longest,
            "norm_eps": draw(st.floats(1e-12, 1, exclude_min=True)),
            "tie_word_embeddings": draw(st.booleans()),
            "initializer_range": draw(st.floats(1e-9, 10)),
            "rescale_prenorm_residual": draw(st.booleans()),
            "eos_token_ids": draw(st.lists(token, max_size=3)),
            **draw(st.fixed_dictionaries({}, optional={"pad_token_id": token, "bos_token_id": token})),
        }
    }
    for kind, table in BLOCK_TABLES.items():
        if kind.symbol in used:
            tables[kind.table] = draw(table(sizes))
    if MOE.symbol in used:
        entry = _moe_layers(tables[MOE.table], symbols, mtp or "", sizes)
        tables[MOE.table]["layers"] = draw(st.lists(entry, max_size=2))
    if mtp is not None:
        scale = draw(st.floats(0, 10))
        tables["mtp"] = {"pattern": mtp, "depth": draw(st.integers(1, 4)), "loss_scaling_factor": scale}
    if draw(st.booleans()):
        tables["quantization"] = draw(_rules(("nvfp4", "w4a16_nvfp4", "fp8", "bf16"), len(symbols)))
    if draw(st.booleans()):
        tables["training"] = draw(_rules(("nvfp4", "mxfp8", "bf16"), len(symbols)))
    length = draw(st.integers(1, longest))
    tables["serving"] = {
        "batch_sizes": draw(st.lists(st.integers(1, 64), min_size=1, max_size=3, unique=True)),
        "max_seq_len": length,
        "prefill_chunk": draw(st.integers(1, length)),
        "draft_tokens": draw(st.integers(0, 5)),
        "kv_cache_dtype": draw(st.sampled_from(["bf16", "fp8", "fp32"])),
        "ssm_state_dtype": draw(st.sampled_from(["fp32", "fp16", "bf16"])),
        "conv_state_dtype": draw(st.sampled_from(["bf16", "fp32"])),
    }
    name = draw(st.from_regex(r"[a-z0-9][a-z0-9._-]{0,20}", fullmatch=True))
    return f"schema = 1\nname = {toml_value(name)}\n" + "".join(_table(key, table) for key, table in tables.items())


@st.composite
def _rules(draw: st.DrawFn, formats: tuple[str, ...], layers: int) -> Table:
    layer = st.integers(0, layers - 1)
    selectors = st.one_of(
        st.sampled_from(["all", "before attention", f"first {layers}", "last 1"]),
        layer.map(str),
        st.tuples(layer, layer).map(lambda pair: f"{min(pair)}..{max(pair)}"),
    )
    blocks = st.sampled_from([[16, 16], [1, 16]])
    globs = st.sampled_from(["*", "mamba.*", "attention.q_proj", "moe.shared.*", "mtp.*", "moe.router", "lm_head"])
    roles = st.fixed_dictionaries(
        {"roles": st.lists(globs, min_size=1, max_size=3), "format": st.sampled_from(formats)},
        optional={"layers": selectors, "block": blocks},
    )
    modules = st.fixed_dictionaries(
        {
            "modules": st.lists(st.sampled_from(["lm_head", "mtp.layers.0.eh_proj"]), min_size=1, max_size=2),
            "format": st.sampled_from(formats),
        }
    )
    rules = draw(st.lists(st.one_of(roles, modules), max_size=4))
    return {"format": draw(st.sampled_from(formats)), "block": draw(blocks), "rules": rules}


def _table(name: str, table: Table) -> str:
    arrays = {
        key: value for key, value in table.items() if isinstance(value, list) and value and isinstance(value[0], dict)
    }
    pairs = [f"{key} = {toml_value(value)}\n" for key, value in table.items() if key not in arrays]
    text = f"[{name}]\n" + "".join(pairs)
    for key, entries in arrays.items():
        text += "".join(_table(f"[{name}.{key}]", entry) for entry in entries)
    return text


def specs(narrowest: int = 1) -> st.SearchStrategy[Spec]:
    """Draw a valid small spec, with `narrowest` channels of anything, or more."""
    return spec_texts(narrowest).map(lambda text: parse_spec(text, "random.toml")[0])
