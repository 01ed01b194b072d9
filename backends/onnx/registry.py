"""The spellings: op → the function that writes it in ONNX.

`causal_conv1d`, `ssd` and `attention` have none: plan_state rewrites them before a graph is emitted.
"""

from __future__ import annotations

from n3c.backends.onnx.spellings.activations import quantize_activation
from n3c.backends.onnx.spellings.attention import cached_attention, write_cache
from n3c.backends.onnx.spellings.buckets import experts
from n3c.backends.onnx.spellings.elementwise import add, concat, embedding, last_token, relu2, shift_left, split
from n3c.backends.onnx.spellings.experts import combine_experts, expand_experts, expert_linear
from n3c.backends.onnx.spellings.gemm import linear
from n3c.backends.onnx.spellings.linears import dequantize_fp8, dequantize_nvfp4
from n3c.backends.onnx.spellings.mamba import causal_conv1d_update, ssd_update
from n3c.backends.onnx.spellings.norms import gated_rms_norm, rms_norm
from n3c.backends.onnx.spellings.router import route

from .emitter import Spelling

SPELLINGS: dict[str, Spelling] = {
    spelling.__name__: spelling
    for spelling in (
        add,
        cached_attention,
        causal_conv1d_update,
        combine_experts,
        concat,
        dequantize_fp8,
        dequantize_nvfp4,
        embedding,
        expand_experts,
        expert_linear,
        experts,
        gated_rms_norm,
        last_token,
        linear,
        quantize_activation,
        relu2,
        rms_norm,
        route,
        shift_left,
        split,
        ssd_update,
        write_cache,
    )
}
"""Op name → its spelling."""
