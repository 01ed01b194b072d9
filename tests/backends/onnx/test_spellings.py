"""Each spelling means what the reference evaluation of its op means."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from n3c.backends.onnx.emit import emit_entry
from n3c.backends.onnx.linear_forms import Choose, LinearForm
from n3c.backends.onnx.registry import SPELLINGS
from n3c.backends.onnx.spellings.one_token import MOST_HEADS
from n3c.ir import ops
from n3c.ir.diagnostics import ExitCode, N3CError, Span
from n3c.ir.op_definition import OPS, OpDef
from n3c.ir.program import Origin, Program
from n3c.ir.rewrite import Builder
from n3c.ir.types import DType
from n3c.runtime.engines.reference.evaluate import evaluate
from support.one_op import BF16, F16, F32, OneOp
from support.onnx_run import OnnxRunner


def compare(one: OneOp, program: Program, tolerance: float = 2e-6, choose: Choose | None = None) -> dict[str, Tensor]:
    """Run both evaluations, compare every output and next state, and return those of ONNX."""
    entry = emit_entry(program, "run", batch=1, choose=choose)
    actual = OnnxRunner(entry, one.values).run(one.values)
    of: Mapping[str, Tensor] = one.values
    reference = evaluate(program, "run", of, of, {name: one.values[name] for name in program.states})
    expected = dict(zip(program.entry_points["run"].outputs, reference.outputs, strict=True)) | reference.states
    assert set(actual) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value if value.dtype is torch.int64 else value.float(), rtol=tolerance, atol=tolerance
        )
    return actual


def test_every_op_has_a_spelling_or_is_rewritten_before() -> None:
    assert set(OPS) - set(SPELLINGS) == {"causal_conv1d", "ssd", "attention"}
    assert set(SPELLINGS) <= set(OPS)


def test_embedding() -> None:
    one = OneOp()
    ids = one.integers("ids", torch.tensor([[3, 0], [6, 6]]))
    compare(one, one.apply(ops.embedding, ids, one.weight("table", 7, 8, dtype=BF16)))


def test_shift_left() -> None:
    one = OneOp()
    ids = one.integers("ids", torch.tensor([[3, 5, 4], [6, 1, 2]]))
    actual = compare(one, one.apply(ops.shift_left, ids))
    assert actual["y0"].tolist() == [[5, 4, 0], [1, 2, 0]]


@pytest.mark.parametrize("op", [ops.add, ops.concat])
def test_two_operands(op: OpDef) -> None:
    one = OneOp()
    compare(one, one.apply(op, one.input("x", 2, 3, 8), one.input("z", 2, 3, 8)))


def test_relu2() -> None:
    one = OneOp()
    compare(one, one.apply(ops.relu2, one.input("x", 2, 3, 8)))


def test_split() -> None:
    one = OneOp()
    compare(one, one.apply(ops.split, one.input("x", 2, 3, 9), sizes=(2, 3, 4)))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_rms_norm(dtype: DType) -> None:
    one = OneOp()
    compare(one, one.apply(ops.rms_norm, one.input("x", 2, 3, 8), one.weight("w", 8, dtype=dtype), eps=0.1))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_gated_rms_norm(groups: int) -> None:
    one = OneOp()
    x, gate, weight = one.input("x", 2, 3, 16), one.input("gate", 2, 3, 16), one.weight("w", 16, dtype=BF16)
    compare(one, one.apply(ops.gated_rms_norm, x, gate, weight, groups=groups, eps=0.1))


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("form", ["f32", "bf16", "fp8", "nvfp4", "packed"])
def test_linear(form: str, tokens: int) -> None:
    one = OneOp()
    x = one.input("x", 2, tokens, 48)
    compare(one, one.apply(ops.linear, x, one.quantized(form, 5, 48)), tolerance=2e-5)


@pytest.mark.parametrize("chosen", ["sum", "by_expert"])
@pytest.mark.parametrize("rows", [1, 3, 2], ids=["one row for all", "a row an expert", "two experts"])
@pytest.mark.parametrize("form", ["f32", "bf16", "fp8", "nvfp4", "packed"])
def test_expert_linear(form: str, rows: int, chosen: LinearForm) -> None:
    one = OneOp()
    x = one.input("x", 2, 2, rows, 32)
    choices = torch.tensor([[[0, 5, 2], [1, 1, 4]], [[3, 0, 5], [5, 4, 3]]])
    indices = one.integers("indices", choices[..., : 2 if rows == 2 else 3])
    program = one.apply(ops.expert_linear, x, indices, one.quantized(form, 6, 5, 32))
    compare(one, program, tolerance=2e-5, choose=lambda _: chosen)


def test_packed_codes_cover_every_byte() -> None:
    """Each of the 256 bytes, so each pair of codes, is read right: the sign of the byte is a trap."""
    one = OneOp()
    x = one.input("x", 1, 1, 1, 512)
    indices = one.integers("indices", torch.tensor([[[0]]]))
    weight = one.quantized("packed", 1, 1, 512)
    one.values["codes"] = torch.arange(256, dtype=torch.int64).to(torch.uint8).view(torch.int8).reshape(1, 1, 32, 8)
    compare(one, one.apply(ops.expert_linear, x, indices, weight), tolerance=1e-4)


def test_experts_dispatch() -> None:
    one = OneOp()
    compare(one, one.apply(ops.expand_experts, one.input("x", 2, 3, 8)))
    two = OneOp()
    compare(two, two.apply(ops.combine_experts, two.input("y", 2, 3, 4, 8), two.input("weights", 2, 3, 4)))


@pytest.mark.parametrize(("n_group", "topk_group"), [(1, 1), (4, 2), (4, 1), (2, 1)])
@pytest.mark.parametrize("norm", [True, False])
def test_route(n_group: int, topk_group: int, norm: bool) -> None:
    one = OneOp()
    program = one.apply(
        ops.route,
        one.input("logits", 3, 2, 16),
        one.weight("bias", 16),
        top_k=4,
        n_group=n_group,
        topk_group=topk_group,
        norm_topk_prob=norm,
        scaling_factor=2.5,
    )
    compare(one, program)


@pytest.mark.parametrize("tokens", [1, 2, 5])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("counted", [True, False])
def test_causal_conv1d_update(tokens: int, dtype: DType, bias: bool, counted: bool) -> None:
    one = OneOp()
    x, window = one.input("x", 2, tokens, 6), one.state("window", 2, 6, 3, dtype=dtype)
    weight = one.weight("w", 6, 1, 4, dtype=BF16)
    counts = one.integers("counts", torch.tensor([0, tokens])) if counted else None
    compare(one, one.apply(ops.causal_conv1d_update, x, window, weight, one.weight("b", 6) if bias else None, counts))


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize(("tokens", "chunk"), [(1, 4), (3, 4), (20, 9)], ids=["one", "few", "pieces"])
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("groups", [1, 2])
def test_ssd_update(tokens: int, chunk: int, dtype: DType, groups: int, counted: bool) -> None:
    one = OneOp()
    x, dt = one.input("x", 2, tokens, 4 * 8), one.input("dt", 2, tokens, 4)
    b, c = one.input("b", 2, tokens, groups * 16), one.input("c", 2, tokens, groups * 16)
    a, d, dt_bias = (one.weight(name, 4) for name in ("a", "d", "dt_bias"))
    one.values["a"] = -one.values["a"].abs()
    state = one.state("state", 2, 4, 8, 16, dtype=dtype)
    counts = one.integers("counts", torch.tensor([0, tokens - 1])) if counted else None
    program = one.apply(ops.ssd_update, x, dt, a, b, c, d, dt_bias, state, counts, n_groups=groups, chunk_size=chunk)
    actual = compare(one, program, tolerance={F32: 2e-5, F16: 3e-3, BF16: 2e-2}[dtype])
    if counted:
        assert torch.equal(actual["state"][0], one.values["state"][0].float())  # no token, no change of any bit


@pytest.mark.parametrize("counts", [None, [0, 3, 2]], ids=["all", "counted"])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_write_cache(tokens: int, dtype: DType, counts: list[int] | None) -> None:
    """Sequences of different lengths, one of them at the end of the cache: what reaches behind it is dropped."""
    one = OneOp()
    new, cache = one.input("new", 3, tokens, 2 * 8), one.state("cache", 3, 2, 12, 8, dtype=dtype)
    lengths = one.integers("lengths", torch.tensor([0, 5, 11]))
    limit = one.integers("counts", torch.tensor(counts).clamp(max=tokens)) if counts else None
    one.function.outputs = []
    one.function.next_states = [one.build.emit(ops.write_cache, new, cache, lengths, limit, name="after")]
    compare(one, one.program(), tolerance=0)


@pytest.mark.parametrize("scale", [None, 0.05], ids=["unscaled", "scaled"])
def test_pairs_of_fp8_codes(scale: float | None) -> None:
    """Every finite value of E4M3 up to 352 in both places of a pair, and larger ones, which are clamped."""
    one = OneOp()
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    values = torch.cat((codes.nan_to_num(0.0), torch.randn(256, generator=one.generator) * 100))
    new, cache = one.input("new", 1, 3, 2 * 256), one.state("cache", 1, 2, 8, 256, dtype=DType.F8E4M3)
    one.values["new"] = torch.stack((values.roll(0), values.roll(1), values.flip(0)))[None] * (scale or 1)
    lengths = one.integers("lengths", torch.tensor([2]))
    scales = one.weight("scale") if scale else None
    if scale:
        one.values["scale"] = torch.tensor(scale)
    one.function.next_states = [one.build.emit(ops.write_cache, new, cache, lengths, None, scales, name="after")]
    program = one.program()
    actual = OnnxRunner(emit_entry(program, "run", batch=1), one.values).run(one.values)["cache"]
    expected = evaluate(program, "run", one.values, one.values, {"cache": one.values["cache"]}).states["cache"]
    assert torch.equal(actual.view(torch.uint8) & 127 != 0, expected.view(torch.uint8) & 127 != 0)
    assert torch.equal(actual.float(), expected.float())
    assert actual.float().abs().max() == 352


@pytest.mark.parametrize("places", [12, 9], ids=["whole cache", "part of it"])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(F32, 2e-6), (BF16, 3e-2)])
def test_cached_attention(tokens: int, dtype: DType, tolerance: float, places: int) -> None:
    """Sequences of different lengths. BF16 caches make the engine's queries and probabilities BF16 too."""
    one = OneOp()
    q = one.input("q", 3, tokens, 4 * 8)
    caches = [one.weight(name, 3, 2, 12, 8, dtype=dtype) for name in ("k_cache", "v_cache")]
    lengths = one.integers("lengths", torch.tensor([0, 5, 9 - tokens]))
    positions = one.integers("positions", torch.arange(places))
    program = one.apply(ops.cached_attention, q, *caches, lengths, positions, num_heads=4, num_kv_heads=2)
    compare(one, program, tolerance)


@pytest.mark.parametrize("heads", [1, MOST_HEADS, MOST_HEADS + 1])
def test_heads_that_share_keys(heads: int) -> None:
    """One token: a sum for each head beside each other, or one for all."""
    one = OneOp()
    caches = [one.weight(name, 2, 2, 6, 8) for name in ("k_cache", "v_cache")]
    lengths, positions = one.integers("lengths", torch.tensor([0, 4])), one.integers("positions", torch.arange(5))
    q = one.input("q", 2, 1, 2 * heads * 8)
    program = one.apply(ops.cached_attention, q, *caches, lengths, positions, num_heads=2 * heads, num_kv_heads=2)
    compare(one, program)


def test_last_token() -> None:
    one = OneOp()
    counts = one.integers("counts", torch.tensor([3, 1, 0]))
    actual = compare(one, one.apply(ops.last_token, one.input("x", 3, 4, 8), counts))
    assert torch.equal(actual["y0"][:, 0], one.values["x"][torch.arange(3), torch.tensor([2, 0, 0])])


def test_an_op_of_training_is_a_located_error() -> None:
    one = OneOp()
    x, weight = one.input("x", 1, 2, 4), one.weight("w", 4, 1, 4)
    span = Span("m.toml", 3, 1)
    one.function.outputs = [Builder(one.function, Origin(span)).emit(ops.causal_conv1d, x, weight, name="y")]
    with pytest.raises(N3CError) as caught:
        emit_entry(one.program(), "run", batch=1)
    (diagnostic,) = caught.value.diagnostics
    assert (diagnostic.code, diagnostic.span, caught.value.exit_code) == ("E0507", span, ExitCode.TARGET)
    assert "causal_conv1d" in diagnostic.message
