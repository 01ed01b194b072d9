"""The form that each linear takes: of those that are admissible the one of the least predicted time."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from n3c.backends.gpus import GPUS, Gpu, gpus_of
from n3c.backends.kernel_work import FP4_BY_TABLE, OTHER, Choice, Cost, Repeated, Work, sum_cost
from n3c.backends.onnx.entry_forms import LinearForms, fastest_for
from n3c.backends.onnx.forms import forms
from n3c.backends.onnx.linear_forms import (
    Applied,
    LinearForm,
    admissible,
    fastest,
    is_read_as_bytes,
    kernels,
    rounds,
    seconds_of,
)
from n3c.backends.onnx.linears import _widened  # pyright: ignore[reportPrivateUsage]
from n3c.ir import ops
from n3c.ir.program import Program
from n3c.ir.types import DType, TensorType
from n3c.passes.serving import serve
from n3c.specs.load import load_spec
from support.specs import SPECS

PRO, SPARK = GPUS["RTX PRO 6000"], GPUS["DGX Spark"]
NORM = frozenset({"RMSNormalization"})
IN_PROJ = Applied(DType.F8E4M3, False, (18560, 4096), 1, True, NORM | {"QuantizeLinear"}, exact=True)
HEAD = Applied(DType.BF16, False, (131072, 4096), 1, False, NORM, exact=True)
LATENT_UP = Applied(DType.BF16, False, (4096, 1024), 1, exact=True)
EXPERTS = Applied(DType.I8, True, (2688, 1024), 1, exact=True, choice=Choice(512, 22, 1))
"""Of Super."""
NVFP4 = Applied(DType.F4E2M1, True, (10304, 2688), 1, True, exact=True)
SMALL = Applied(DType.BF16, False, (64, 32), 3)  # 4096 bytes; x has 4 x 3 x 32 = 384 bytes, y 768
CODES = replace(SMALL, dtype=DType.F4E2M1, blocked=True, rounded=True)  # 1024 bytes of codes, 128 of scales
CHOICE = Choice(8, 3, 4)


@pytest.mark.parametrize(
    ("applied", "form"),
    [
        (LATENT_UP, "sum"),
        (replace(LATENT_UP, rows=4), "sum"),  # 8 MB: read again from L2
        (replace(HEAD, rows=2), "siblings"),  # 1 GB: read again from memory
        (replace(HEAD, rows=32), "siblings"),
        (replace(HEAD, rows=33), "sum_by_rows"),  # more outputs than a kernel has
        (replace(HEAD, rows=256, exact=False), "product"),
        (replace(IN_PROJ, rows=8), "product"),
        (replace(IN_PROJ, rows=8, dtype=DType.I8, rounded=False), "siblings"),  # no FP8: a product widens the weight
        (replace(IN_PROJ, shape=(128, 64), rows=8), "sum"),  # of a tiny model, whose time is that of launches
        (EXPERTS, "sum"),
        (replace(EXPERTS, rows=32, choice=Choice(512, 22, 32)), "by_expert"),
        (replace(EXPERTS, rows=256, choice=Choice(512, 22, 256)), "sum"),  # more pairs than TopK sorts
        (NVFP4, "sum"),  # its codes as bytes
        (replace(NVFP4, rows=4), "product"),
        (replace(NVFP4, shape=(3712, 2688)), "sum"),
        (replace(NVFP4, rounded=False, around=NORM), "sum"),
        (replace(LATENT_UP, beside_loop=True, exact=False), "product"),
    ],
)
def test_named_cases(applied: Applied, form: LinearForm) -> None:
    assert fastest(PRO)(applied) == form


def test_the_gpu_decides() -> None:
    """37.7 MB for two rows stay in the L2 of one card, and come from memory again on the other."""
    qkv = Applied(DType.BF16, False, (4608, 4096), 2, False, NORM, exact=True)
    assert (fastest(PRO)(qkv), fastest(SPARK)(qkv)) == ("sum", "siblings")
    experts = replace(EXPERTS, rows=4, choice=Choice(512, 22, 4))  # 88 of 1.5 MB: 36 MB of L2 or 128
    assert (fastest(PRO)(experts), fastest(SPARK)(experts)) == ("sum", "by_expert")
    nano = serve(load_spec(SPECS / "nano.toml")[0]).program
    assert (fastest_for(nano)(qkv), fastest_for(nano, (121,))(qkv)) == ("sum", "siblings")
    assert fastest_for(nano, (120,)) is fastest(GPUS["RTX 5090"], PRO)  # others do not hold its weights
    assert fastest_for(Program("small"), (86,)) is fastest(*gpus_of((86,)))
    large = replace(NVFP4, rounded=False, rows=6, shape=(262144, 8192))
    assert (fastest(PRO)(large), fastest(SPARK)(large)) == ("sum", "sum_by_rows")


@pytest.mark.parametrize(("least", "labels"), [(5, ["decode", "prefill"]), (4, ["decode.b1", "decode.b4", "prefill"])])
def test_the_batches_of_an_entry_point(least: int, labels: list[str]) -> None:
    """They are told apart where their forms differ; prefill is for one sequence at a time."""
    program = serve(load_spec(SPECS / "tiny.toml")[0]).program
    entries = {name: program.entry_points[name] for name in ("decode", "prefill")}
    rows = set[int]()

    def choose(applied: Applied) -> LinearForm:
        rows.add(applied.rows)
        return "product" if applied.rows >= least else "sum"

    found = forms(replace(program, entry_points=entries), (1, 4), (), choose)
    assert list(dict.fromkeys(form.entry for form in found)) == labels
    assert rows == {1, 4, entries["prefill"].tokens}


TYPES = [DType.F4E2M1, DType.F8E4M3, DType.BF16, DType.F32, DType.I8]
SIZES = st.integers(1, 512).map(lambda n: 16 * n)


@st.composite
def linears(draw: st.DrawFn) -> Applied:
    if draw(st.booleans()):
        top_k, tokens = draw(st.integers(1, 22)), draw(st.integers(1, 64))
        return replace(EXPERTS, rows=tokens, choice=Choice(draw(st.integers(top_k, 512)), top_k, tokens))
    dtype = draw(st.sampled_from(TYPES))
    blocked = dtype is DType.F4E2M1 or (dtype is DType.I8 and draw(st.booleans()))
    return Applied(
        dtype,
        blocked,
        (draw(SIZES), draw(SIZES)),
        draw(st.integers(1, 300)),
        rounded=dtype in (DType.F4E2M1, DType.F8E4M3) and draw(st.booleans()),
        around=frozenset(draw(st.sets(st.sampled_from(["RMSNormalization", "Sqrt", "Relu", "QuantizeLinear"])))),
        wide=draw(st.booleans()),
        exact=(exact := draw(st.booleans())),
        beside_loop=not exact and draw(st.booleans()),
    )


@given(linears(), st.sampled_from(list(GPUS.values())))
def test_no_admissible_form_is_faster(applied: Applied, gpu: Gpu) -> None:
    chosen = fastest(gpu)(applied)
    times = {form: seconds_of(form, applied, gpu) for form in admissible(applied)}
    assert times[chosen] == min(times.values()) > 0


@given(linears())
def test_what_is_admissible(applied: Applied) -> None:
    forms = admissible(applied)
    assert forms
    if applied.exact:
        assert not any(rounds(form, applied) for form in forms)
    if applied.beside_loop:
        assert forms == ("product",)


@pytest.mark.parametrize(
    ("applied", "forms"),
    [
        (EXPERTS, ("sum",)),
        (replace(EXPERTS, rows=2, choice=Choice(512, 22, 2)), ("sum", "by_expert")),
        (replace(EXPERTS, rows=192, choice=Choice(512, 20, 192)), ("sum", "by_expert")),  # 3,840 pairs
        (replace(EXPERTS, rows=167, choice=Choice(512, 23, 167)), ("sum",)),  # 3,841
        (LATENT_UP, ("sum",)),
        (SMALL, ("sum", "sum_by_rows", "siblings", "product")),  # of whom nothing else is said
        (replace(LATENT_UP, exact=False), ("sum", "product")),
        (replace(LATENT_UP, rows=2), ("sum", "sum_by_rows", "siblings")),
        (replace(LATENT_UP, rows=32), ("sum", "sum_by_rows", "siblings")),
        (replace(LATENT_UP, rows=33), ("sum", "sum_by_rows")),
        (NVFP4, ("sum", "product")),
        (replace(NVFP4, rows=2), ("sum", "sum_by_rows", "product")),
        (replace(NVFP4, rows=2, dtype=DType.I8, rounded=False), ("sum",)),
        (replace(IN_PROJ, rows=2), ("sum", "sum_by_rows", "siblings", "product")),
        (replace(IN_PROJ, beside_loop=True, exact=False), ("product",)),
    ],
)
def test_the_admissible_forms(applied: Applied, forms: tuple[LinearForm, ...]) -> None:
    assert admissible(applied) == forms


@pytest.mark.parametrize(
    ("applied", "passing"),
    [
        (NVFP4, (4 * 2688 // 2, 4 * 4 * 10304)),  # codes
        (IN_PROJ, (4 * 4096, 4 * 4 * 18560)),
        (replace(LATENT_UP, exact=False), (2 * 4 * 1024, 4 * 4 * 4096)),  # BF16
        (replace(LATENT_UP, dtype=DType.F8E4M3, exact=False), (2 * 4096 * 1024, 2 * 4 * 1024, 4 * 4 * 4096)),  # widened
        (replace(LATENT_UP, dtype=DType.F8E4M3, wide=True), (4 * 4096 * 1024, 2 * 4 * 1024, 4 * 4 * 4096)),
    ],
)
def test_the_bytes_that_a_product_reads_and_writes(applied: Applied, passing: tuple[int, ...]) -> None:
    """Of four rows, by the kernel of the product itself: the widened weight, if any, x and y."""
    *_, product = kernels("product", replace(applied, rows=4))
    assert product.passing == passing
    assert product.stored == (0 if len(passing) == 3 else applied.bytes)


@pytest.mark.parametrize(
    ("form", "applied", "outputs", "elements"),
    [
        ("sum", replace(LATENT_UP, rows=3), 1, 3 * 4096 * 1024),
        ("sum_by_rows", replace(LATENT_UP, rows=3), 1, 3 * 4096 * 1024),
        ("siblings", replace(LATENT_UP, rows=3), 3, 4096 * 1024),
        ("sum", replace(EXPERTS, rows=4, choice=Choice(512, 22, 4)), 1, 88 * 2688 * 1024),
        ("by_expert", replace(EXPERTS, rows=4, choice=Choice(512, 22, 4)), 1, 88 * 2688 * 1024),
    ],
)
def test_the_work_of_sums(form: LinearForm, applied: Applied, outputs: int, elements: int) -> None:
    """That of an element is `sum_cost`'s; rows that are siblings decode it together."""
    cost = sum_cost(applied.dtype, (), fp8=not applied.blocked, by_table=applied.by_table, outputs=outputs)
    (work,) = (work for work in kernels(form, applied) if work.form == "sum")
    assert (work.instructions, work.wavefronts) == (elements * cost.instructions, elements * cost.wavefronts)


def elementwise(size: int) -> Work:
    """The work of a kernel that reads and writes so many bytes in float32."""
    return Work("other", 0, (size, size), (), 0, size / 4 * OTHER.instructions, size / 4 * OTHER.wavefronts)


@pytest.mark.parametrize(
    ("form", "applied", "expected"),
    [
        ("sum", SMALL, [Work("sum", 4096, (384, 768), (Repeated(4096, 3),))]),
        ("sum_by_rows", SMALL, [Work("sum", 4096, (384, 768), sectors=2 * 4096), elementwise(768)]),
        ("siblings", SMALL, [Work("sum", 4096, (384, 768)), elementwise(768)]),
        ("sum", CODES, [*3 * [elementwise(384)], Work("sum", 1152, (384, 768), (Repeated(1152, 3),))]),
        (
            "sum",
            replace(CODES, shape=(2, 512)),  # long enough to be read in planes
            [elementwise(4 * 3 * 512), Work("sum", 576, (4 * 3 * 512, 24), (Repeated(576, 3),))],
        ),
        (
            "sum_by_rows",
            replace(CODES, shape=(2, 512)),  # planes are of one row
            [*3 * [elementwise(6144)], Work("sum", 576, (6144, 24), sectors=2 * 576), elementwise(24)],
        ),
        (
            "sum",
            replace(CODES, dtype=DType.I8, rounded=False),
            [elementwise(384), Work("sum", 1152, (384, 768), (Repeated(1152, 3),))],
        ),
        (
            "sum",
            replace(SMALL, dtype=DType.F8E4M3, rounded=True),
            [Work("sum", 2048, (384, 768), (Repeated(2048, 3),))],
        ),
        (
            "sum",
            replace(CODES, dtype=DType.I8, choice=CHOICE),
            [Work("sum", round(1152 * CHOICE.distinct), (1536, 3072), (Repeated(3456, 4, CHOICE),))],
        ),
        (
            "by_expert",
            replace(CODES, dtype=DType.I8, choice=CHOICE),
            [
                *(elementwise(size) for size in (48, 1536, 3072)),
                Work(
                    "sum",
                    round(1152 * CHOICE.distinct),
                    (1536, 3072),
                    (Repeated(3456, 4, replace(CHOICE, by_expert=True)),),
                ),
            ],
        ),
        ("product", SMALL, [elementwise(384), Work("product", 4096, (192, 768), flops={DType.BF16: 2 * 16 * 64 * 32})]),
        (
            "product",
            replace(SMALL, rows=17, dtype=DType.F8E4M3, rounded=True),
            [elementwise(2176), Work("product", 2048, (544, 4352), flops={DType.F8E4M3: 2 * 32 * 64 * 32})],
        ),
        (
            "product",
            CODES,
            [
                *(elementwise(size) for size in (384, 384, 96, 96)),
                Work("other", 128, (128,), (), 0, 128 * OTHER.instructions, 128 * OTHER.wavefronts),
                Work("product", 1152, (48, 768), flops={DType.F4E2M1: 2 * 16 * 64 * 32}),
            ],
        ),
        (
            "product",
            replace(SMALL, wide=True),
            [
                Work("other", 4096, (8192,), (), 0, 2048 * OTHER.instructions, 2048 * OTHER.wavefronts),
                elementwise(384),
                Work("product", 0, (8192, 192, 768), flops={DType.F32: 2 * 16 * 64 * 32}),
            ],
        ),
    ],
)
def test_the_kernels_of_a_form(form: LinearForm, applied: Applied, expected: list[Work]) -> None:
    """By hand, but for what a sum computes, which `test_the_work_of_sums` has."""
    found = [replace(w, instructions=0.0, wavefronts=0.0) if w.form == "sum" else w for w in kernels(form, applied)]
    assert found == expected


@pytest.mark.parametrize(
    ("dtype", "k", "read"), [(DType.F4E2M1, 512, True), (DType.F4E2M1, 496, False), (DType.F8E4M3, 512, False)]
)
def test_long_sums_read_codes_as_bytes(dtype: DType, k: int, read: bool) -> None:
    assert is_read_as_bytes(dtype, k) is read


@pytest.mark.parametrize(("by_table", "cost"), [(False, OTHER), (True, FP4_BY_TABLE)])
def test_the_work_of_widening_a_weight(by_table: bool, cost: Cost) -> None:
    dtype = DType.I8 if by_table else DType.F8E4M3
    widening, *_ = kernels("product", Applied(dtype, by_table, (64, 32), 4))
    assert widening.stored == (64 * 32 // 2 + 64 * 2 if by_table else 64 * 32)
    assert (widening.instructions, widening.wavefronts) == (2048 * cost.instructions, 2048 * cost.wavefronts)


@pytest.mark.parametrize(
    ("dtype", "format_", "narrow", "wide"),
    [
        (DType.F32, "fp32", "", ""),
        (DType.BF16, "bf16", "", "fp32"),
        (DType.F8E4M3, "fp8", "", ""),
        (DType.F4E2M1, "nvfp4", "", ""),
        (DType.I8, "nvfp4", "bf16", "fp32"),
    ],
)
def test_to_what_products_have_weights_dequantized(dtype: DType, format_: str, narrow: str, wide: str) -> None:
    parameter: Any = SimpleNamespace(type=TensorType(dtype, (4, 16)), format=format_)
    assert (_widened(parameter, False), _widened(parameter, True)) == (narrow, wide)


@pytest.mark.parametrize(
    ("dtype", "blocked", "bytes_"),
    [
        (DType.F4E2M1, True, 1024 + 128),
        (DType.I8, True, 1024 + 128),
        (DType.I8, False, 2048),
        (DType.F8E4M3, False, 2048),
        (DType.BF16, False, 4096),
        (DType.F32, False, 8192),
    ],
)
def test_the_bytes_of_a_weight(dtype: DType, blocked: bool, bytes_: int) -> None:
    """[64, 32]: codes, and a scale for each 16 of NVFP4."""
    assert replace(SMALL, dtype=dtype, blocked=blocked).bytes == bytes_


@pytest.mark.parametrize("name", ["tiny", "nano", "super"])
@pytest.mark.parametrize("sm", [89, 120])
def test_a_draft_is_judged_by_the_numbers_that_it_is_decoded_with(name: str, sm: int) -> None:
    """Of whole models: decode, draft and verify of any batch round to BF16 nowhere; a long prefill does."""
    program = serve(load_spec(SPECS / f"{name}.toml")[0]).program
    for entry_name, entry in program.entry_points.items():
        for batch in (1, 8, 64):
            forms = LinearForms(program, entry, {"B": batch, "S": entry.tokens}, fastest(*gpus_of((sm,))))
            nodes = [node for call in entry.calls for node in program.functions[call.function].nodes]
            rounded = [node for node in nodes if node.op is ops.linear and forms.rounds(node)]
            assert not rounded or entry_name == "prefill"
