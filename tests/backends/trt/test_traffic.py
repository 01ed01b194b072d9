"""The traffic audit: hand-computed cases, and agreement with what `n3c inspect` says must be moved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from n3c.backends.kernel_work import Choice
from n3c.backends.onnx.bindings import parameter_of
from n3c.backends.onnx.emit import OnnxEntry, emit_entry
from n3c.backends.onnx.graph import LOOP
from n3c.backends.trt.build import build_plan
from n3c.backends.trt.layers import Kernel, TensorInfo
from n3c.backends.trt.module import load_trt
from n3c.backends.trt.needs import needs_of, tokens_of
from n3c.backends.trt.traffic import KernelTraffic, Moved, Traffic, traffic, traffic_json
from n3c.compiler.report.cost import decode_bytes
from n3c.passes.serving import Served, serve
from n3c.specs.load import load_spec
from support.specs import QUANTIZED, SMALL, SPECS, small_spec, spec_from_text

BATCH = 2
CONTEXT = 20
"""Of a capacity of 32."""


@pytest.fixture(scope="module")
def served() -> Served:
    return serve(small_spec(QUANTIZED))


@pytest.fixture(scope="module")
def entry(served: Served) -> OnnxEntry:
    return emit_entry(served.program, "decode", batch=BATCH)


def account(served: Served, entry: OnnxEntry, *kernels: Kernel) -> Traffic:
    return traffic(served.program, served.program.entry_points["decode"], entry, kernels, context=CONTEXT)


def tensor(name: str, dtype: str, *dims: int) -> TensorInfo:
    return TensorInfo(name, dims, (), dtype)


def kernel(inputs: list[TensorInfo], outputs: list[TensorInfo], *, constants: tuple[TensorInfo, ...] = ()) -> Kernel:
    return Kernel("k", "kgen", "", tuple(inputs), tuple(outputs), constants)


X = tensor("x", "Float", BATCH, 1, 64)  # 512 bytes
EXPERTS = "backbone.layers.1.mixer.experts.*.up_proj.weight.bytes"  # [8, 48, 32] in NVFP4: 24 bytes * 32 a row
CACHE = "backbone.layers.3.k_cache"  # [2, 2, 32, 16] in float32: 4096 bytes a sequence


def test_a_weight_counts_once_and_activations_are_excess(served: Served, entry: OnnxEntry) -> None:
    name = "backbone.layers.0.mixer.in_proj.weight"
    codes = next(tensor(b.name, "FP8", *b.shape) for b in entry.weights if b.name == name)
    (row,) = account(served, entry, kernel([codes, codes, X], [tensor("y", "Float", 10)])).kernels
    assert row.moved == Moved(codes.elements + 512 + 40, codes.elements)
    assert (row.layer, row.kind, row.excess) == ("backbone.layers.0", "mamba2", 552)


def test_a_weight_that_is_read_twice_is_ideal_once(served: Served, entry: OnnxEntry) -> None:
    norm = tensor("backbone.layers.0.norm.weight", "BFloat16", 64)
    first, second = account(served, entry, kernel([norm], []), kernel([norm], [])).kernels
    assert (first.moved, second.moved) == (Moved(128, 128), Moved(128, 0))


def test_rows_of_a_merged_weight_that_nothing_reads_are_not_needed(served: Served, entry: OnnxEntry) -> None:
    name = "backbone.layers.3.mixer.q_proj+k_proj+v_proj.weight"  # [64 + 32 + 32, 64] in BF16
    queries, keys = tensor(name, "BFloat16", 64, 64), tensor(name, "BFloat16", 32, 64)
    none = account(served, entry).total.ideal
    found = account(served, entry, kernel([queries], []), kernel([keys], []))
    assert [row.moved.ideal for row in found.kernels] == [8192, 4096]
    found = account(served, entry, kernel([keys], []))
    assert found.total == Moved(4096, none - 3 * 4096)


def test_constants_and_unknown_tensors_are_excess(served: Served, entry: OnnxEntry) -> None:
    table = tensor("table", "Float", 256)
    found = account(served, entry, kernel([X], [], constants=(table,)))
    (row,) = found.kernels
    assert (row.moved, row.kind) == (Moved(512 + 1024, 0), "other")
    assert found.by_kind["other"] == row.moved


def test_gathered_experts_count_once(served: Served, entry: OnnxEntry) -> None:
    """2 tokens choose 3 of 8 experts each and meet 8 (1 - (5/8)^2) = 4.875, of 48 x 32 codes of 4 bits."""
    codes = tensor(EXPERTS, "Int8", 8, 48, 16)
    (row,) = account(served, entry, kernel([codes], [tensor("y", "Float", BATCH, 1, 3, 48)])).kernels
    assert row.moved == Moved(3744 + 4 * BATCH * 3 * 48, 3744)  # 4.875 * 48 * 16
    copy = tensor("copy", "Int32", 8, 48, 16)
    (row,) = account(served, entry, kernel([codes], [copy])).kernels
    assert row.moved == Moved(8 * 48 * 16 + copy.bytes, 3744)


def test_gathered_experts_are_never_more_than_all(served: Served) -> None:
    """40 tokens choose 3 of 8 experts each: all, but for what rounding leaves."""
    entry = emit_entry(served.program, "decode", batch=40)
    codes = tensor(EXPERTS, "Int8", 8, 48, 16)
    (row,) = account(served, entry, kernel([codes], [])).kernels
    assert row.moved == Moved(codes.bytes, codes.bytes)


def test_a_weight_that_is_bound_in_two_types_must_be_moved_once(served: Served) -> None:
    """Prefill multiplies what is stored, and computes from its bytes what no bucket holds."""
    entry = emit_entry(served.program, "prefill", batch=1, tokens=256)
    needs = needs_of(served.program, served.program.entry_points["prefill"], entry, CONTEXT)
    assert needs.reads[EXPERTS] is needs.reads[parameter_of(EXPERTS)]
    assert needs.reads[EXPERTS].ideal == 8 * 48 * 16


def test_what_a_cache_keeps_of_experts() -> None:
    """22 of 512, Super: 8 tokens meet 152; where the last 2 tokens' stay, 164 are read, where none do, 176."""
    choice = Choice(512, 22, 8)
    assert choice.distinct == pytest.approx(151.7, abs=0.1)
    assert [round(choice.fetched(kept)) for kept in (0, 2, 8)] == [176, 164, 152]
    assert Choice(512, 22, 1).distinct == pytest.approx(22)


def test_the_embedding_counts_the_rows_of_the_tokens(served: Served, entry: OnnxEntry) -> None:
    table = tensor("backbone.embeddings.weight", "BFloat16", 97, 64)
    (row,) = account(served, entry, kernel([table], [X])).kernels
    assert row.moved == Moved(BATCH * 128 + X.bytes, BATCH * 128)


def test_a_cache_in_place_counts_the_new_tokens(served: Served, entry: OnnxEntry) -> None:
    """One position is 2 heads of 16 float32 a sequence: 128 bytes."""
    cache = tensor(f"{CACHE}.next", "Float", BATCH, 2, 32, 16)
    (row,) = account(served, entry, kernel([cache, X], [cache])).kernels
    assert row.moved == Moved(BATCH * 128 + X.bytes, BATCH * 128)


@pytest.mark.parametrize(("length", "positions"), [(32, 32), (-1, CONTEXT)], ids=["static", "dynamic"])
def test_a_cache_that_is_attended_to(length: int, positions: int, served: Served, entry: OnnxEntry) -> None:
    """The whole capacity where a kernel's length is fixed; what must be read is the context."""
    cache = tensor(f"{CACHE}.next", "Float", BATCH, 2, 32, 16)
    mask = tensor("mask", "Bool", BATCH, 1, 1, length)
    (row,) = account(served, entry, kernel([cache, mask], [])).kernels
    assert row.moved == Moved(BATCH * (128 * positions + positions), BATCH * 128 * CONTEXT)


def test_several_new_tokens_in_a_cache(served: Served) -> None:
    """128 bytes each, as in decode."""
    verify, point = emit_entry(served.program, "verify", batch=BATCH), served.program.entry_points["verify"]
    tokens = tokens_of(verify)
    assert tokens > 1
    needs = needs_of(served.program, point, verify, CONTEXT)
    assert needs.writes[f"{CACHE}.next"].ideal == BATCH * 128 * tokens


def test_rows_that_are_gathered_from_a_cache(served: Served, entry: OnnxEntry) -> None:
    """What sums nothing reads no more than it writes; a kernel of unknown nodes may read all."""
    cache, rows = tensor(f"{CACHE}.next", "Float", BATCH, 2, 32, 16), tensor("rows", "Float", BATCH, 2, 3, 16)
    gather = Kernel("k", "kgen", "", (cache,), (rows,), (), ("backbone.layers.3/Gather.1", "backbone.layers.3/Min"))
    (row,) = account(served, entry, gather).kernels
    assert row.moved.bytes == 2 * rows.bytes
    (row,) = account(served, entry, replace(gather, nodes=("backbone.layers.3/ReduceSum.2",))).kernels
    assert row.moved.bytes == cache.bytes + rows.bytes


def test_a_cache_that_is_written_whole(served: Served, entry: OnnxEntry) -> None:
    old, new = (tensor(name, "Float", BATCH, 2, 32, 16) for name in (CACHE, f"{CACHE}.next"))
    (row,) = account(served, entry, kernel([old], [new])).kernels
    assert row.moved == Moved(old.bytes + new.bytes, BATCH * 128 * (CONTEXT + 1))


def test_a_round_that_does_not_run_moves_nothing(served: Served, entry: OnnxEntry) -> None:
    """Within a Loop, which goes round where buckets overflow; what it names is still to be moved."""
    codes, nodes = tensor(EXPERTS, "Int8", 8, 48, 16), (f"backbone.layers.1/{LOOP}/Mul.1",)
    idle = Kernel("k", "kgen", "", (codes,), (X,), (), nodes)
    found = account(served, entry, idle)
    (row,) = found.kernels
    assert row == KernelTraffic("overflow", "backbone.layers.1", "moe", Moved(0, 0), ())
    assert found.total == account(served, entry).total


def test_a_kernel_of_activations_belongs_to_the_call_of_its_nodes(served: Served, entry: OnnxEntry) -> None:
    for label, layer, kind in (("backbone.layers.1", "backbone.layers.1", "moe"), ("elsewhere", "", "other")):
        (row,) = account(served, entry, Kernel("k", "kgen", "", (X,), (), (), (f"{label}/Sigmoid.1",))).kernels
        assert (row.op, row.layer, row.kind) == ("Sigmoid", layer, kind)


def test_a_kernel_has_the_name_and_the_layer_of_most_of_what_it_moves(served: Served, entry: OnnxEntry) -> None:
    """Of its operators where weights are less than a fifth of all; of equal weights of the first."""
    first, other = (tensor(f"backbone.layers.{n}.norm.weight", "BFloat16", 64) for n in (0, 1))
    (row,) = account(served, entry, kernel([first, other], [])).kernels
    assert (row.op, row.layer) == ("norm", "backbone.layers.0")
    larger = tensor("backbone.layers.3.mixer.o_proj.weight", "BFloat16", 64, 64)
    (row,) = account(served, entry, kernel([first, larger], [])).kernels
    assert (row.op, row.layer) == ("mixer.o_proj", "backbone.layers.3")
    nodes = tuple(f"backbone.layers.0/{operator}.1" for operator in ("Sqrt", "Add", "Mul", "Reshape", "Div"))
    for size, op in ((127, "norm"), (128, "Add, Div, Mul")):  # 128 bytes against 508 and 512
        (row,) = account(served, entry, replace(kernel([first], [tensor("y", "Float", size)]), nodes=nodes)).kernels
        assert row.op == op


def test_a_label_has_the_kind_of_its_block(served: Served) -> None:
    """What stands before and behind the drafter's blocks has the labels of the first and of the last."""
    draft, point = emit_entry(served.program, "draft", batch=1), served.program.entry_points["draft"]
    labels = ("mtp.layers.0", "mtp.layers.1", "lm_head")
    rows = [Kernel("k", "kgen", "", (X,), (), (), (f"{label}/Sigmoid.1",)) for label in labels]
    found = traffic(served.program, point, draft, rows, context=CONTEXT).kernels
    assert [row.kind for row in found] == ["mtp.attention", "mtp.moe", "head"]


def test_stages_of_one_entry_point_add_up() -> None:
    one = Traffic(CONTEXT, Moved(1, 2), {"moe": Moved(1, 2)}, ())
    two = Traffic(CONTEXT, Moved(4, 8), {"moe": Moved(3, 6), "mlp": Moved(1, 2), "head": Moved(0, 0)}, ())
    both = Traffic(CONTEXT, Moved(5, 10), {"moe": Moved(4, 8), "mlp": Moved(1, 2), "head": Moved(0, 0)}, ())
    assert one + two == two + one == both
    assert list(both.as_json()["by_kind"]) == ["moe", "mlp"]


def test_recurrent_states_are_read_and_written_whole(served: Served, entry: OnnxEntry) -> None:
    old, new = (tensor(f"backbone.layers.0.ssm_state{s}", "Float", BATCH, 8, 16, 16) for s in ("", ".next"))
    (row,) = account(served, entry, kernel([old, X], [new])).kernels
    assert row.moved == Moved(2 * old.bytes + X.bytes, 2 * old.bytes)


def test_what_no_kernel_names_must_be_moved_all_the_same(served: Served, entry: OnnxEntry) -> None:
    nothing = account(served, entry)
    assert nothing.total.bytes == 0
    assert nothing.total == sum(nothing.by_kind.values(), Moved(0, 0))
    norm = tensor("backbone.layers.0.norm.weight", "BFloat16", 64)
    assert account(served, entry, kernel([norm], [])).total == Moved(128, nothing.total.ideal)
    assert {"mamba2", "moe", "attention", "mlp", "head", "embedding", "norm"} < set(nothing.by_kind)


@pytest.mark.parametrize(("name", "batch"), [("super", 8), ("nano", 1)])
def test_the_least_is_that_of_inspect(name: str, batch: int) -> None:
    """Counted here from the graph's inputs and outputs, there from the program's tables."""
    spec = load_spec(SPECS / f"{name}.toml")[0]
    served = serve(spec)
    entry = emit_entry(served.program, "decode", batch=batch)
    found = traffic(served.program, served.program.entry_points["decode"], entry, (), context=4096).total.ideal
    ends = batch * (8 + 8 + 4 * spec.model.vocab_size) + 8 * 4096  # ids, lengths and logits; positions of keys
    assert found - ends == pytest.approx(decode_bytes(served, spec, batch, 4096)["total"], rel=1e-6)


def test_of_a_real_plan(served: Served, entry: OnnxEntry, tmp_path: Path) -> None:
    result = build_plan(entry.to_bytes(), tmp_path / "x.plan", load_trt(), sms=(120,), ranges=entry.dynamic_inputs)
    found = account(served, entry, *result.kernels)
    assert 1 < found.total.bytes / found.total.ideal < 1.6  # activations weigh more in so small a model
    assert found.total == sum(found.by_kind.values(), Moved(0, 0))
    assert sum(row.moved.ideal for row in found.kernels) == found.total.ideal  # every tensor is found in some kernel
    assert found.worst[0].excess == max(row.excess for row in found.kernels)
    data = traffic_json({"a.s0.plan": found, "a.s1.plan": found}, {"a.s0.plan": "a", "a.s1.plan": "a"})
    assert data["entries"]["a"]["bytes"] == 2 * found.total.bytes
    assert data["entries"]["a"]["by_kind"]["moe"]["ideal"] == 2 * found.by_kind["moe"].ideal
    assert data["plans"]["a.s0.plan"]["worst"][0].keys() == {"op", "layer", "kind", "bytes", "ideal"}


def test_attention_costs_what_is_filled_whatever_the_capacity(tmp_path: Path) -> None:
    """A plan for 64 times the tokens moves the same at 20 tokens of context."""
    moved: list[Moved] = []
    for capacity in (64, 4096):
        limits = ("max_position_embeddings = 64", f"max_position_embeddings = {capacity}")
        text = SMALL.replace(*limits).replace("max_seq_len = 32", f"max_seq_len = {capacity}")
        program = serve(spec_from_text(text.replace('"MEM*E-ME"', '"*"'))).program
        entry = emit_entry(program, "decode", batch=1)
        plan = tmp_path / f"{capacity}.plan"
        result = build_plan(entry.to_bytes(), plan, load_trt(), sms=(120,), ranges=entry.dynamic_inputs)
        found = traffic(program, program.entry_points["decode"], entry, result.kernels, context=20)
        moved.append(found.by_kind["attention"])
    assert moved[0] == moved[1]
