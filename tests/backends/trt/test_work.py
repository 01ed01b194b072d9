"""What kernels do, and the time that it takes on a GPU of round numbers, by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest

from n3c.backends.gpus import GPUS, Gpu
from n3c.backends.kernel_time import HIDDEN, LAUNCH, MEMORY_SHARE, PRODUCT_SHARE, Bound, duration, parts_of
from n3c.backends.kernel_work import FP4_BY_TABLE, IDLE, OTHER, Choice, Repeated, Work
from n3c.backends.onnx.emit import OnnxEntry, emit_entry
from n3c.backends.trt.build import build_plan
from n3c.backends.trt.layers import Kernel, TensorInfo
from n3c.backends.trt.module import load_trt
from n3c.backends.trt.needs import tokens_of
from n3c.backends.trt.timing import KernelTime, Prediction, Time, predict, times_json
from n3c.backends.trt.traffic import KernelTraffic, Moved, traffic
from n3c.ir.types import DType
from n3c.passes.serving import Served, serve
from support.specs import QUANTIZED, small_spec

CONTEXT = 20
GPU = Gpu("round", 120, 10**10, 1e12, 1000, 1, 1e9, 1e12, 2e12, 4e12, 100, "")
"""A TB/s, 1000 bytes of L2, one multiprocessor at a GHz: each second 4e9 instructions, 1e9 wavefronts, 16e9 of L2."""


@pytest.fixture(scope="module")
def served() -> Served:
    return serve(small_spec(QUANTIZED))


def tensor(name: str, dtype: str, *dims: int) -> TensorInfo:
    return TensorInfo(name, dims, (), dtype)


def kernel(inputs: list[TensorInfo], outputs: list[TensorInfo], *nodes: str, type: str = "kgen") -> Kernel:
    label = "backbone.layers.0"
    return Kernel("k", type, "", tuple(inputs), tuple(outputs), (), tuple(f"{label}/{node}" for node in nodes))


def predicted(served: Served, batch: int, *kernels: Kernel, gpu: Gpu = GPU) -> Prediction:
    entry_point = served.program.entry_points["decode"]
    entry = emit_entry(served.program, "decode", batch=batch)
    moved = traffic(served.program, entry_point, entry, kernels, context=CONTEXT)
    return predict(served.program, entry_point, entry, kernels, moved, [gpu])[gpu.name]


def work(served: Served, batch: int, *kernels: Kernel) -> Work:
    return predicted(served, batch, *kernels).kernels[-1].work


def in_proj(served: Served) -> tuple[str, int, int]:
    name = "backbone.layers.0.mixer.in_proj.weight"
    n, k = served.program.parameters[name].type.static_dims
    return name, n, k


def summed(served: Served, batch: int, *nodes: str, transposed: bool = False) -> Kernel:
    """The sum of in_proj, FP8, over `batch` rows."""
    name, n, k = in_proj(served)
    result = tensor("y", "Float", n, batch, 1) if transposed else tensor("y", "Float", batch, 1, n, 1)
    return kernel([tensor(name, "FP8", n, k), tensor("x", "Float", batch, 1, k)], [result], "Mul", "ReduceSum", *nodes)


def test_a_sum_decodes_a_weight_for_every_row_and_reads_it_again(served: Served) -> None:
    _, n, k = in_proj(served)
    one, four = work(served, 1, summed(served, 1)), work(served, 4, summed(served, 4))
    assert (one.form, one.stored) == ("sum", n * k)
    assert one.instructions == n * k * 5.5
    assert four.instructions == 4 * one.instructions
    assert four.repeated == (Repeated(n * k, 4),)
    assert four.repeated[0].further == 3 * n * k
    assert four.repeated[0].missed(1000) == 3 * (n * k - 1000)
    assert four.repeated[0].missed(n * k) == 0


def test_neighbouring_rows_share_what_they_read(served: Served) -> None:
    name, n, k = in_proj(served)
    found = work(served, 4, summed(served, 4, transposed=True))
    assert (found.repeated, found.sectors) == ((), 3 * n * k), name
    whole = summed(served, 4, transposed=True)
    parted = replace(whole, outputs=(tensor("y", "Float", n // 2, 2, 4),))
    assert work(served, 4, parted).sectors == 3 * n * k


def test_sums_beside_each_other_decode_a_weight_once(served: Served) -> None:
    """An output for each of four rows: FP8 takes 5.5 instructions, three further rows 1.7 and a wavefront each."""
    name, n, k = in_proj(served)
    outputs = [tensor(f"y{row}", "Float", n, 1) for row in range(4)]
    found = work(served, 4, kernel([tensor(name, "FP8", n, k), tensor("x", "Float", 4, k)], outputs, "ReduceSum"))
    assert found.instructions == pytest.approx(n * k * (5.5 + 3 * 1.7))
    assert found.wavefronts == pytest.approx(n * k * (1.3 + 3 * 1.0))
    assert (found.repeated, found.sectors) == ((Repeated(n * k, 1),), 0)
    assert found.repeated[0].further == 0


def test_a_norm_in_front_and_single_elements_cost_more(served: Served) -> None:
    _, n, k = in_proj(served)
    assert work(served, 1, summed(served, 1, "RMSNormalization")).instructions == pytest.approx(n * k * 8.9)
    assert work(served, 1, summed(served, 1, "Relu")).instructions == pytest.approx(n * k * 16.5)
    assert work(served, 1, summed(served, 1, "Gather")).instructions == pytest.approx(n * k * 14)


def test_experts_are_read_again_where_the_cache_has_lost_them(served: Served) -> None:
    """3 of 8 experts a token, [48, 32] in NVFP4, as bytes."""
    name = "backbone.layers.1.mixer.experts.*.up_proj.weight"
    codes, scales = tensor(f"{name}.bytes", "Int8", 8, 48, 2, 8), tensor(f"{name}_scale.bytes", "Int8", 8, 48, 2)
    gathered = kernel([codes, scales], [tensor("y", "Float", 4, 1, 3, 48)], "GatherND", "Mul", "ReduceSum")
    found = work(served, 4, gathered)
    assert found.instructions == pytest.approx(4 * 3 * 48 * 32 * 12.5)
    expert = 48 * (16 + 2)
    (again,) = found.repeated
    assert again == Repeated(3 * expert, 4, Choice(8, 3, 4))
    assert again.further == pytest.approx((12 - Choice(8, 3, 4).distinct) * expert)
    assert again.missed(0) == pytest.approx(again.further)
    assert again.missed(4 * 3 * expert) == pytest.approx(0, abs=1e-6)


def test_experts_in_order_leave_memory_once() -> None:
    """22 of 512 for 32 tokens: 386 different ones, where the last token's alone stay in the cache 675 of 704."""
    choice = Choice(512, 22, 32)
    again = Repeated(22 * 100, 32, choice)
    assert round(again.missed(22 * 100) / 100) == round(choice.fetched(1) - choice.distinct) == 288
    in_order = replace(again, choice=replace(choice, by_expert=True))
    assert in_order.missed(0) == 0
    assert in_order.further == again.further  # from L2


def test_scores_and_values(served: Served) -> None:
    """4 query heads, 2 key/value heads of 16, 20 of 32 positions: 4 x 20 x 16 products each, values by sectors."""
    cache = tensor("backbone.layers.3.k_cache.next", "Float", 1, 2, 32, 16)
    scores = kernel([cache], [tensor("scores", "Float", 1, 2, 2, -1, 1)], "Mul", "ReduceSum")
    found = work(served, 1, scores)
    assert (found.form, found.instructions, found.sectors) == ("sum", 4 * 20 * 16 * 3.0, 4 * 20 * 16 * 4)
    heads = [tensor(f"scores{head}", "Float", 1, 2, -1, 1) for head in range(2)]
    shared = work(served, 1, kernel([cache], heads, "Mul", "ReduceSum"))
    assert (shared.instructions, shared.sectors) == (2 * 20 * 16 * (3.0 + 1.7), 2 * 20 * 16 * 4)
    assert shared.wavefronts == 2 * 20 * 16 * (2.0 + 1.0)
    values = kernel([cache, tensor("p", "Float", 1, 2, 2, -1)], [tensor("y", "Float", 1, 2, 2, 1, 16)], "ReduceSum")
    found = work(served, 1, values)
    assert (found.sectors, found.wavefronts) == (4 * 20 * 16 * 32, 0.0)


@pytest.mark.parametrize(
    ("types", "dtype"),
    [
        (("FP8", "FP8"), DType.F8E4M3),
        (("FP4E2M1", "FP4E2M1"), DType.F4E2M1),
        (("BFloat16", "FP8"), DType.BF16),
        (("FP8", "BFloat16"), DType.BF16),
        (("Half", "Half"), DType.BF16),
        (("Float", "Float"), DType.F32),
        (("BFloat16", "Float"), DType.F32),
    ],
)
def test_products_are_rounded_up_to_tiles(types: tuple[str, str], dtype: DType, served: Served) -> None:
    left, right = tensor("x", types[0], 2, 20, 64), tensor("w", types[1], 2, 64, 100)
    inputs = [left, right, tensor("scale", "Float", 1)]
    found = work(served, 1, kernel(inputs, [tensor("y", "Float", 2, 20, 100)], "MatMul", type="gemm"))
    assert (found.form, found.flops) == ("product", {dtype: 2 * 2 * 32 * 112 * 64})
    assert (found.sectors, found.instructions, found.wavefronts) == (0, 0, 0)


def test_elements_one_by_one_are_those_of_the_largest_tensor(served: Served) -> None:
    """As far as it is moved: 64 BF16 of a norm, 97 rows of an activation of unknown length."""
    norm = tensor("backbone.layers.0.norm.weight", "BFloat16", 64)
    for inputs, outputs, elements in (
        ([norm], [tensor("y", "Float", 10)], 64),
        ([norm], [tensor("y", "Float", 97)], 97),
        ([tensor("x", "Float", -1, 7), norm], [tensor("y", "Float", 10)], CONTEXT * 7),
    ):
        found = work(served, 1, kernel(inputs, outputs, "Sigmoid"))
        assert (found.form, found.instructions) == ("other", elements * OTHER.instructions)
        assert (found.wavefronts, found.sectors) == (elements * OTHER.wavefronts, 0)


def test_codes_as_bytes_are_looked_up_wherever_they_are_read(served: Served) -> None:
    """Of a weight; other bytes are numbers as they are."""
    codes = tensor("backbone.layers.1.mixer.experts.*.up_proj.weight.bytes", "Int8", 8, 48, 2, 8)
    for read, cost in ((codes, FP4_BY_TABLE), (tensor("mask", "Int8", 8, 48), OTHER)):
        found = work(served, 1, kernel([read], [tensor("y", "Float", 5000)], "Mul"))
        assert (found.form, found.instructions) == ("other", 5000 * cost.instructions)
        assert found.wavefronts == 5000 * cost.wavefronts


def test_attention_of_many_tokens_is_a_product(served: Served) -> None:
    fused = replace(kernel([], [tensor("y", "BFloat16", 4, 8, 16)], "Attention"), name="_gemm_mha_v2_myl0_7")
    assert work(served, 1, fused).flops == {DType.BF16: 4 * CONTEXT * 4 * 8 * 16}


def test_bytes_and_arithmetic_hide_behind_each_other_by_half() -> None:
    parts: dict[Bound, float] = {"memory": 4, "L2": 3, "instructions": 7, "L1": 6, "products": 0, "launch": 3}
    assert duration(parts) == (3 + 7 + 4 / 2, "instructions")
    parts["L2"] = 9
    assert duration(parts) == (3 + 9 + 7 / 2, "L2")
    parts["launch"] = 10
    assert duration(parts)[1] == "launch"


def test_the_times_of_a_kernel() -> None:
    done = Work("sum", 9000, (400, 600), (Repeated(5000, 3),), 100, 1.28e6, 3.2e4, {DType.F8E4M3: 1e6, DType.F32: 1e6})
    assert parts_of(done, GPU) == pytest.approx(
        {
            "memory": (9000 + 600 + 2 * (5000 - 1000)) / (MEMORY_SHARE * 1e12),
            "L2": (9000 + 1000 + 100 + 2 * 5000) / 16e9,
            "instructions": 1e-5,
            "L1": 1e-6,
            "products": (1e6 / 2e12 + 1e6 / 5e11) / PRODUCT_SHARE,
            "launch": LAUNCH,
        }
    )


def test_the_roofline_is_of_the_least_bytes_or_operations(served: Served) -> None:
    card = GPUS["RTX 3090"]
    nothing = predicted(served, 1, gpu=card).total
    assert nothing.predicted == 0
    assert nothing.roofline == nothing.memory > nothing.products > 0
    weak = predicted(served, 1, gpu=replace(card, bf16=card.bf16 / 1000)).total
    assert weak.roofline == weak.products == pytest.approx(1000 * nothing.products)
    assert predicted(served, 1, gpu=replace(card, fp8=2 * card.bf16)).total.products < nothing.products


def test_the_least_operations_of_a_kind(served: Served) -> None:
    """Of the MLP, [96, 64] and [64, 96]: two operations for each weight and row."""
    shapes = [served.program.parameters[f"backbone.layers.5.mixer.{side}_proj.weight"].type for side in ("up", "down")]
    assert [shape.static_dims for shape in shapes] == [(96, 64), (64, 96)]
    operations = 2 * 2 * 96 * 64
    card = GPUS["RTX 3090"]
    for batch in (1, 3):
        found = predicted(served, batch, gpu=card).by_kind["mlp"]
        assert found.products == pytest.approx(batch * operations / card.bf16, rel=1e-9)


def test_ops_that_lose_most_come_first() -> None:
    """Seconds of both kernels of an op against those of the bytes that must be moved; five ops at most."""

    def row(op: str, seconds: float, least: float, bound: Bound) -> KernelTime:
        return KernelTime(KernelTraffic(op, f"layer.{op}", "moe", Moved(0, 0), ()), done, seconds, least, bound)

    done = Work("sum", 0, ())
    rows = [row("near", 5, 4, "L2"), row("far", 3, 1, "L1"), row("far", 2, 1, "memory")]
    rows += [row(f"no loss {n}", 1, 1, "launch") for n in range(4)]
    worst = Prediction(Time(0, 0, 0, {}), {}, tuple(rows)).worst()
    assert worst[0] == {
        "op": "sum: far",
        "kind": "moe",
        "layer": "layer.far",
        "kernels": 2,
        "predicted_us": 5e6,
        "least_us": 2e6,
        "bound_by": "L1",
    }
    assert [each["op"] for each in worst] == ["sum: far", "sum: near", *(f"sum: no loss {n}" for n in range(3))]


def test_what_nothing_exceeds() -> None:
    """Shares of what a data sheet promises, what is hidden, and the seconds of a launch."""
    assert all(0 < share <= 1 for share in (MEMORY_SHARE, PRODUCT_SHARE, HIDDEN))
    assert 0 < LAUNCH < 1e-4


@pytest.mark.parametrize(("sm", "bytes_"), [(80, 24), (90, 24), (100, 24), (86, 16), (89, 16), (120, 16)])
def test_the_chips_of_data_centres_read_more_of_their_cache(sm: int, bytes_: int) -> None:
    """Bytes a clock and multiprocessor; of one without work there is no time."""
    chip = replace(GPU, sm=sm, multiprocessors=2)
    assert parts_of(Work("other", 4800, ()), chip)["L2"] == 4800 / (bytes_ * 2e9)
    assert set(parts_of(IDLE, chip).values()) == {0.0}


def test_stages_of_one_entry_point_add_up() -> None:
    """Kinds that one of them lacks, and bounds, count as nothing there."""
    one = Time(1, 2, 4, {"L2": 1})
    two = Time(8, 16, 32, {"L2": 3, "launch": 5})
    both = Prediction(one, {"a": one}, ()) + Prediction(two, {"a": two, "b": two}, ())
    bounds: dict[Bound, float] = dict.fromkeys(get_args(Bound), 0.0)
    total = Time(9, 18, 36, {**bounds, "L2": 4, "launch": 5})
    assert both == Prediction(total, {"a": total, "b": replace(two, by_bound={**bounds, **two.by_bound})}, ())
    assert both.total.as_json() == {"predicted_us": 9e6, "roofline_us": 36e6, "ratio": 0.25, "bound_by": "launch"}
    assert Time(0, 2, 1, {}).as_json() == {"predicted_us": 0, "roofline_us": 2e6, "ratio": 0, "bound_by": None}
    assert Time(0, 0, 0, {}).as_json()["ratio"] is None


def test_the_tokens_of_an_entry_point() -> None:
    """Of the first input with an axis of tokens: no length, which has none, and no state."""

    def entry(*arguments: tuple[str, tuple[int, ...]]) -> Any:
        return SimpleNamespace(arguments=[SimpleNamespace(kind=kind, shape=shape) for kind, shape in arguments])

    assert tokens_of(entry(("state", (2, 7)), ("input", (2,)), ("input", (2, 5)), ("input", (2, 6)))) == 5
    assert tokens_of(entry(("state", (2, 7)), ("input", (2,)))) == 1


def test_ops_of_all_layers_are_named_together(served: Served) -> None:
    found = predicted(served, 4, summed(served, 4), summed(served, 4), kernel([], [tensor("y", "Float", 4)], "Sigmoid"))
    worst, other = found.worst()
    assert (worst["op"], worst["kind"], worst["kernels"]) == ("sum: mixer.in_proj", "mamba2", 2)
    assert worst["layer"] == "backbone.layers.0"
    assert (other["op"], other["bound_by"]) == ("other: Sigmoid", "launch")
    assert worst["predicted_us"] == pytest.approx(2e6 * found.kernels[0].seconds, abs=0.01)


def test_of_a_real_plan_on_every_gpu(served: Served, tmp_path: Path) -> None:
    entry: OnnxEntry = emit_entry(served.program, "decode", batch=2)
    entry_point = served.program.entry_points["decode"]
    result = build_plan(entry.to_bytes(), tmp_path / "x.plan", load_trt(), sms=(120,), ranges=entry.dynamic_inputs)
    moved = traffic(served.program, entry_point, entry, result.kernels, context=CONTEXT)
    found = predict(served.program, entry_point, entry, result.kernels, moved, GPUS.values())
    assert list(found) == list(GPUS)
    least = sum(kind.ideal for kind in moved.by_kind.values())
    for name, prediction in found.items():
        assert prediction.total.memory == pytest.approx(least / GPUS[name].bandwidth)
        kinds = [time.predicted for time in prediction.by_kind.values()]
        assert prediction.total.predicted == pytest.approx(sum(kinds))
        assert prediction.total.predicted == pytest.approx(sum(kernel.seconds for kernel in prediction.kernels))
        assert sum(prediction.total.by_bound.values()) == pytest.approx(prediction.total.predicted)
        assert {kernel.work.form for kernel in prediction.kernels} == {"sum", "product", "other"}
    json = times_json({"a.s0.plan": found, "a.s1.plan": found}, {"a.s0.plan": "a", "a.s1.plan": "a"})
    one, two = found["RTX 5090"].as_json(), json["a"]["RTX 5090"]
    assert two["kernels"] == 2 * one["kernels"]
    assert two["predicted_us"] == pytest.approx(2 * one["predicted_us"], abs=0.02)
    assert two["ratio"] == pytest.approx(one["ratio"], abs=0.001)
    assert {"predicted_us", "roofline_us", "ratio", "bound_by", "by_kind", "worst"} <= set(two)
