"""Specs cut small: the structure of a model, in sizes that a test can run."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from n3c.specs.blocks import Attention, Mamba, Mlp, Moe
from n3c.specs.pattern import Pattern
from n3c.specs.schema import Spec


def cut_small(spec: Spec) -> Spec:
    """Return `spec` with sizes of a few channels, and of its layers one for each pair that follow one another.

    Kept are which blocks follow which, what is shared by several heads or groups, whether experts are latent or have
    a shared one, and every flag and factor. Rules of formats go.
    """
    pattern = Pattern.parse(_shortened(spec.model.pattern.symbols))
    return replace(
        spec,
        model=replace(spec.model, hidden_size=40, vocab_size=67, pattern=pattern, eos_token_ids=()),
        mamba=spec.mamba and _mamba(spec.mamba),
        attention=spec.attention and _attention(spec.attention),
        moe=spec.moe and _moe(spec.moe),
        mlp=spec.mlp and Mlp(56),
        quantization=None,
        training=None,
    )


def _shortened(symbols: str) -> str:
    """Leave out layers, the longest stretch first, while the same pairs follow one another."""
    pairs = set(pairwise(symbols))
    for length in range(len(symbols) - 1, 0, -1):
        start = 0
        while start + length <= len(symbols):
            shorter = symbols[:start] + symbols[start + length :]
            if shorter and set(pairwise(shorter)) == pairs:
                symbols = shorter
            else:
                start += 1
    return symbols


def _mamba(m: Mamba) -> Mamba:
    groups = min(m.n_groups, 2)
    heads = groups * min(m.num_heads // m.n_groups, 3)
    return replace(m, num_heads=heads, head_dim=8, state_size=6, n_groups=groups, chunk_size=4)


def _attention(a: Attention) -> Attention:
    shared = min(a.num_kv_heads, 2)
    return Attention(shared * min(a.num_heads // a.num_kv_heads, 3), shared, 8)


def _moe(m: Moe) -> Moe:
    groups = min(m.n_group, 4)
    return replace(
        m,
        num_experts=12,
        top_k=min(m.top_k, 3),
        intermediate_size=20,
        shared_intermediate_size=28 if m.shared_intermediate_size else 0,
        latent_size=16 if m.latent_size else None,
        n_group=groups,
        topk_group=min(m.topk_group, groups),
    )
