"""Hypothesis strategies for small random specs."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from n3c.specs.dump import toml_value
from n3c.specs.load import parse_spec
from n3c.specs.schema import Spec

SIZES = st.integers(1, 96)


@st.composite
def spec_texts(draw: st.DrawFn) -> str:
    """Draw the TOML text of a valid small spec: every kind of block, odd sizes, rules, MTP."""
    symbols = draw(st.text("ME*-", min_size=1, max_size=8))
    cuts = draw(st.lists(st.integers(0, len(symbols)), max_size=2).map(sorted))
    text = symbols
    for cut in reversed(cuts):
        text = text[:cut] + "|" + text[cut:]
    mtp = draw(st.none() | st.text("*E", min_size=1, max_size=3))
    used = symbols + (mtp or "")
    vocabulary = draw(st.integers(2, 300))
    token = st.integers(0, vocabulary - 1)
    longest = draw(st.integers(1, 10_000))
    tables: dict[str, dict[str, Any]] = {
        "model": {
            "hidden_size": draw(SIZES),
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
    if "M" in used:
        groups = draw(st.integers(1, 4))
        low = draw(st.floats(1e-6, 1))
        tables["mamba"] = {
            "num_heads": groups * draw(st.integers(1, 4)),
            "head_dim": draw(SIZES),
            "state_size": draw(SIZES),
            "n_groups": groups,
            "conv_kernel": draw(st.integers(2, 6)),
            "chunk_size": draw(SIZES),
            "conv_bias": draw(st.booleans()),
            "time_step_min": low,
            "time_step_max": low * draw(st.integers(1, 9)),
            "time_step_floor": draw(st.floats(1e-9, 1)),
        }
    if "*" in used:
        shared = draw(st.integers(1, 4))
        heads = shared * draw(st.integers(1, 4))
        tables["attention"] = {"num_heads": heads, "num_kv_heads": shared, "head_dim": draw(SIZES)}
    if "E" in used:
        groups = draw(st.integers(1, 4))
        in_group = draw(st.integers(2, 6))
        chosen = draw(st.integers(1, groups))
        tables["moe"] = {
            "num_experts": groups * in_group,
            "top_k": draw(st.integers(1, chosen * in_group)),
            "intermediate_size": draw(SIZES),
            "shared_intermediate_size": draw(st.integers(0, 96)),
            "routed_scaling_factor": draw(st.floats(0.01, 100)),
            "norm_topk_prob": draw(st.booleans()),
            "n_group": groups,
            "topk_group": chosen,
            **draw(st.fixed_dictionaries({}, optional={"latent_size": SIZES})),
        }
    if "-" in symbols:
        tables["mlp"] = {"intermediate_size": draw(SIZES)}
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
def _rules(draw: st.DrawFn, formats: tuple[str, ...], layers: int) -> dict[str, Any]:
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


def _table(name: str, table: dict[str, Any]) -> str:
    pairs = [f"{key} = {toml_value(value)}\n" for key, value in table.items() if key != "rules"]
    text = f"[{name}]\n" + "".join(pairs)
    for rule in table.get("rules", ()):
        text += _table(f"[{name}.rules]", rule)
    return text


def specs() -> st.SearchStrategy[Spec]:
    """Draw a valid small spec."""
    return spec_texts().map(lambda text: parse_spec(text, "random.toml")[0])
