"""Small specs, as text and loaded."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from n3c.specs.load import load_spec
from n3c.specs.schema import Spec

SPECS = Path(__file__).parents[2] / "specs"

SMALL = """
schema = 1
name = "small"
[model]
hidden_size = 64
vocab_size = 97
max_position_embeddings = 64
pattern = "MEM*E-ME"
initializer_range = 0.1
[mamba]
num_heads = 8
head_dim = 16
state_size = 16
n_groups = 2
chunk_size = 8
[attention]
num_heads = 4
num_kv_heads = 2
head_dim = 16
[moe]
num_experts = 8
top_k = 3
intermediate_size = 48
shared_intermediate_size = 80
latent_size = 32
routed_scaling_factor = 2.5
n_group = 4
topk_group = 2
[mlp]
intermediate_size = 96
[mtp]
pattern = "*E"
depth = 2
[serving]
max_seq_len = 32
kv_cache_dtype = "fp32"
conv_state_dtype = "fp32"
"""
"""Every block kind, latent experts, grouped router, MTP."""

QUANTIZED = """
[quantization]
format = "nvfp4"
block = [16, 16]
[[quantization.rules]]
roles = ["attention.*", "moe.router", "lm_head", "embedding", "mtp.*"]
format = "bf16"
[[quantization.rules]]
roles = ["mamba.*_proj"]
format = "fp8"
[[quantization.rules]]
roles = ["moe.shared.up"]
layers = "last 4"
format = "bf16"
"""


LAYERS = """
[[moe.layers]]
layers = "1"
top_k = 1
intermediate_size = 32
[[moe.layers]]
layers = "last 1"
top_k = 4
[[moe.layers]]
layers = "mtp"
top_k = 2
intermediate_size = 64
shared_intermediate_size = 112
"""
"""Each MoE block of `SMALL` in sizes of its own but for one: a compressed model."""


def spec_from_text(text: str) -> Spec:
    """Load a spec from its text."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "spec.toml"
        path.write_text(text, encoding="utf-8")
        return load_spec(path)[0]


def small_spec(extra: str = "", *, latent: bool = True, odd: tuple[str, str] | None = None) -> Spec:
    """Return the spec `SMALL` with more tables behind it; `odd` replaces one line by another."""
    text = SMALL if latent else SMALL.replace("latent_size = 32\n", "")
    if odd is not None:
        assert odd[0] in text
        text = text.replace(*odd)
    return spec_from_text(text + extra)


def weight_only(spec: Spec) -> Spec:
    """Return a spec that is served without rounding activations."""
    return replace(spec, serving=replace(spec.serving, activations="weight_only"))
