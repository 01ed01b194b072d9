"""The state plan: the published bytes, and a layout without overlaps."""

from __future__ import annotations

from dataclasses import replace

import pytest

from n3c.passes.serving import serve
from n3c.passes.state_layout import ALIGNMENT
from n3c.specs.load import load_spec
from n3c.specs.pattern import Pattern
from support.specs import SPECS, small_spec


@pytest.mark.parametrize(
    ("name", "kv_per_token", "per_request"),
    [
        ("nano", 6_144, 49_082_368),
        ("super", 8_192, 170_229_760),
        ("ultra", 12_288, 407_961_600),
        ("nemotron-nano-9b-v2", 16_384, 143_548_416),
        ("nemotron-h-8b", 16_384, 102_137_856),
    ],
)
def test_published_bytes(name: str, kv_per_token: int, per_request: int) -> None:
    """FP32 SSM state, BF16 convolution window and KV cache, as vLLM's and TensorRT-LLM's state calculators give."""
    plan = serve(load_spec(SPECS / f"{name}.toml")[0]).plan
    assert plan.kv_bytes_per_token == kv_per_token
    assert plan.bytes_per_request == per_request


def test_states_lie_apart_and_aligned() -> None:
    served = serve(small_spec())
    end = 0
    for state in served.plan.states:
        assert state.offset % ALIGNMENT == 0
        assert state.offset >= end
        end = state.offset + state.bytes
    assert served.plan.total_bytes >= end
    kinds = {state.kind for state in served.plan.states}
    assert kinds == {"kv", "conv", "ssm", "pending"}
    # three Mamba layers with two states and two pending ones, attention of the model and of the MTP block with two
    assert len(served.plan.states) == 3 * 4 + 2 * 2


def test_who_uses_a_state_and_how_it_lies() -> None:
    states = {state.name: state for state in serve(small_spec()).plan.states}
    assert states["backbone.layers.0.ssm_state"].entries == ("decode", "prefill", "verify")
    assert states["backbone.layers.0.conv_pending"].entries == ("verify",)
    assert states["backbone.layers.3.k_cache"].entries == ("decode", "prefill", "verify")
    assert states["mtp.layers.0.k_cache"].entries == ("prefill", "verify", "draft")
    assert states["backbone.layers.3.k_cache"].shape == (2, 32, 16)
    assert states["backbone.layers.3.k_cache"].strides == (32 * 16 * 4, 16 * 4, 4)
    assert states["backbone.layers.0.conv_pending"].shape == (4, 128 + 2 * 2 * 16)
    assert states["mtp.layers.0.k_cache"].layer == 8  # after the layers of the model


def test_what_taking_back_drafts_costs() -> None:
    """Per layer and token: the convolution's input and dt in float32, against a copy of SSM state and window."""
    plan = serve(load_spec(SPECS / "super.toml")[0]).plan
    assert plan.pending_bytes == 40 * (1 + plan.draft_tokens) * (10_240 + 128) * 4
    assert plan.copies_bytes == plan.draft_tokens * 170_229_760
    assert plan.as_json()["snapshots"] == {
        "draft_tokens": plan.draft_tokens,
        "pending_bytes": plan.pending_bytes,
        "full_copies_bytes": plan.copies_bytes,
    }
    assert sum(s.bytes for s in plan.states) == plan.bytes_at(plan.max_seq_len)


def test_caches_of_fp8() -> None:
    """Half the bytes of BF16, and a scale for keys and values of each layer that a checkpoint may hold."""
    served = serve(load_spec(SPECS / "super.toml", ["serving.kv_cache_dtype=fp8"])[0])
    assert served.plan.kv_bytes_per_token == 4_096
    assert {s.dtype for s in served.plan.states if s.kind == "kv"} == {"f8e4m3"}
    scales = [p for p in served.program.parameters.values() if p.role == "attention.cache_scale"]
    assert len(scales) == 2 * (8 + 1)
    names = {str(p.source) for p in scales}
    assert "cache_scale(backbone.layers.7.mixer.k_proj.k_scale)" in names
    assert "cache_scale(mtp.layers.0.mixer.v_proj.v_scale)" in names


def test_entry_points_without_drafts() -> None:
    """Without drafted tokens nothing waits; without an MTP block there is nothing to draft with."""
    names = set(serve(small_spec(odd=("max_seq_len = 32", "max_seq_len = 32\ndraft_tokens = 0"))).program.entry_points)
    assert names == {"prefill", "decode", "draft"}
    served = serve(small_spec(odd=('[mtp]\npattern = "*E"\ndepth = 2\n', "")))
    assert set(served.program.entry_points) == {"prefill", "decode"}
    assert not any(state.name.startswith("mtp") or state.kind == "pending" for state in served.plan.states)
    assert "following_ids" not in served.program.entry_points["prefill"].inputs


@pytest.mark.parametrize(("dtype", "name"), [("fp16", "f16"), ("bf16", "bf16"), ("fp32", "f32")])
def test_ssm_dtypes(dtype: str, name: str) -> None:
    spec = small_spec(odd=("max_seq_len = 32", f'max_seq_len = 32\nssm_state_dtype = "{dtype}"'))
    assert {s.dtype for s in serve(spec).plan.states if s.kind == "ssm"} == {name}


@pytest.mark.parametrize(
    ("pattern", "filled"),
    [
        ("*E", ["mtp_input.following", "attention.prefill.states"]),
        ("E*", ["mtp_input.following", "moe.prefill", "attention.prefill.states"]),
        ("E", []),
    ],
)
def test_prefill_computes_of_the_mtp_block_what_fills_its_caches(pattern: str, filled: list[str]) -> None:
    spec = small_spec()
    assert spec.mtp is not None
    program = serve(replace(spec, mtp=replace(spec.mtp, pattern=Pattern.parse(pattern)))).program
    calls = [call for call in program.entry_points["prefill"].calls if call.label.startswith("mtp.")]
    assert [call.function for call in calls] == filled
    assert not calls or (calls[-1].states and not calls[-1].outputs)
