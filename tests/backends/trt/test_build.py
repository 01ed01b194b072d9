"""Plans of a small decode graph, built for a GPU that is not there."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from n3c.backends.onnx.emit import OnnxEntry, emit_entry
from n3c.backends.onnx.graph import GraphBuilder
from n3c.backends.trt.audit import audit
from n3c.backends.trt.build import PlanResult, build_plan
from n3c.backends.trt.log import BuilderStep, Steps
from n3c.backends.trt.module import load_trt
from n3c.backends.trt.targets import PORTABLE, lacking
from n3c.ir.diagnostics import ExitCode, N3CError, Span
from n3c.ir.types import DType
from n3c.passes.serving import serve
from support.progress import Recorded
from support.specs import QUANTIZED, small_spec

LIBRARY = 8_192_000
"""Bytes of scratch that the builder sets aside, once a plan, for kernels of its library (type `gemm`): FP8 products."""


@dataclass(frozen=True)
class Built:
    entry: OnnxEntry
    result: PlanResult
    events: list[tuple[str, int, int]]


def decode_entry(batch: int, *, latent: bool = True) -> OnnxEntry:
    return emit_entry(serve(small_spec(QUANTIZED, latent=latent)).program, "decode", batch=batch)


@pytest.fixture(scope="module", params=[(1, True), (3, False)], ids=["batch 1, latent", "batch 3, standard"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Every block kind and format, once as a file and once from memory."""
    batch, latent = request.param
    folder = tmp_path_factory.mktemp("plan")
    entry = decode_entry(batch, latent=latent)
    events = Recorded()
    model: bytes | Path = entry.to_bytes()
    if batch == 1:
        entry.save(model := folder / "decode.onnx")
    result = build_plan(
        model,
        folder / "decode.plan",
        load_trt(),
        sms=(120,),
        ranges=entry.dynamic_inputs,
        progress=events,
        locate=entry.locate,
    )
    return Built(entry, result, events.steps)


def test_every_precision_is_realised(built: Built) -> None:
    verdict = audit(built.entry.linears, built.result.kernels, built.entry.output_names, built.result.scratch_bytes)
    assert verdict.mismatches == ()
    assert {finding.realised for finding in verdict.findings} == {"nvfp4", "fp8", "bf16"}


def test_the_plan_is_there_and_small(built: Built) -> None:
    assert built.result.path.stat().st_size == built.result.bytes > 10_000
    assert not list(built.result.path.parent.glob("*.partial"))
    own = any(kernel.type == "gemm" for kernel in built.result.kernels)
    assert 0 < built.result.scratch_bytes - (LIBRARY if own else 0) < 100_000
    assert built.result.seconds > built.result.parse_seconds > 0


@pytest.mark.parametrize("name", ["decode", "verify", "prefill"])
def test_the_parser_makes_few_layers_of_a_result(name: str) -> None:
    """Of a Slice it makes some 24, of each part of a Split one: what is cut into many parts is split."""
    spec = small_spec(QUANTIZED, odd=("max_seq_len = 32", "max_seq_len = 32\nprefill_chunk = 16\ndraft_tokens = 2"))
    entry = emit_entry(serve(spec).program, name, batch=3 if name != "prefill" else 1)
    trt = load_trt()
    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(entry.to_bytes())
    results = sum(len(node.outputs) for node in entry.model.graph)
    assert results < network.num_layers < 2 * results


def test_every_input_is_read_by_a_kernel(built: Built) -> None:
    read = {tensor.name for kernel in built.result.kernels for tensor in kernel.inputs}
    written = {tensor.name for kernel in built.result.kernels for tensor in kernel.outputs}
    caches = {name for name in built.entry.output_names if "cache" in name}
    names = {row["name"] for row in (*built.entry.bindings, *built.entry.inputs)}
    # a cache is updated in place, and so known by the name of its next state only
    assert {name for name in names if "cache" not in name} <= read
    assert built.entry.output_names <= written and caches <= read


def test_attention_reads_what_is_filled(built: Built) -> None:
    """The length of what is attended to is an input, and no kernel makes a copy of that part of the keys."""
    caches = {name for name in built.entry.output_names if "cache" in name}
    readers = [k for k in built.result.kernels if caches & ({t.name for t in k.inputs} - {t.name for t in k.outputs})]
    assert readers and all(any(t.dynamic for t in (*k.inputs, *k.outputs)) for k in readers)
    copied = {t.name for k in readers if not k.sums for t in k.inputs} & caches
    assert copied and all("v_cache" in name for name in copied)


def test_progress(built: Built) -> None:
    assert built.events[0][0] == "Parsing ONNX"
    assert len({what for what, _, _ in built.events}) > 1
    assert all(total == 0 or done <= total for _, done, total in built.events)


def test_silence_is_told_as_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """The builder's long step comes right after the event of another, which would be shown all the time."""
    clock = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: clock)
    steps = Steps()
    steps.begin("Determining refit engines", 1)
    clock = 0.5
    assert steps.now() == BuilderStep("Determining refit engines", 0, 1)
    clock = 7.0
    assert steps.now() == BuilderStep("Compiling kernels", 0, 0)
    assert steps.step("Next", 1)
    assert steps.now() == BuilderStep("Next", 1, 0)


def fails(model: bytes, plan: Path, *sms: int, ranges: dict[str, tuple[int, int, int]] | None = None) -> N3CError:
    def locate(name: str) -> Span | None:
        return SPAN if name.startswith("layer/") else None

    with pytest.raises(N3CError) as caught:
        build_plan(model, plan, load_trt(), sms=sms or (120,), ranges=ranges, locate=locate)
    assert not plan.exists() and not list(plan.parent.glob("*.partial"))
    return caught.value


SPAN = Span("m.toml", 3, 5)


def test_no_model(tmp_path: Path) -> None:
    error = fails(b"no model", tmp_path / "x.plan")
    assert (error.diagnostics[0].code, error.exit_code) == ("E0504", ExitCode.TARGET)


def test_what_the_parser_refuses_has_a_place(tmp_path: Path) -> None:
    g = GraphBuilder("g")
    g.scope = "layer/"
    x = g.input("x", DType.F32, (2, 3))
    g.output(g.node("Reshape", x, g.i64(4)), "y", DType.F32, (4,))
    error = fails(_bytes(g), tmp_path / "x.plan")
    (diagnostic,) = error.diagnostics
    assert (diagnostic.code, diagnostic.span) == ("E0504", SPAN)
    assert "layer/Reshape" in diagnostic.message and "\n" not in diagnostic.message


def test_what_the_builder_refuses_has_a_place(tmp_path: Path) -> None:
    """A cache update that is not itself an output."""
    g = GraphBuilder("g")
    g.scope = "layer/"
    cache, new = g.input("cache", DType.F32, (1, 2, 8, 4)), g.input("new", DType.F32, (1, 2, 1, 4))
    written = g.node("TensorScatter", cache, new, g.input("at", DType.I64, (1,)), axis=2, mode="linear")
    g.output(g.node("Identity", written), "y", DType.F32, (1, 2, 8, 4))
    error = fails(_bytes(g), tmp_path / "x.plan")
    assert error.exit_code is ExitCode.TARGET
    assert any(d.code == "E0505" and d.span == SPAN and "network output" in d.message for d in error.diagnostics)


def test_fp4_for_a_gpu_without_it(tmp_path: Path) -> None:
    """Why codes are bound as bytes for such a GPU: the builder is the proof that the table is right."""
    entry = decode_entry(1)
    error = fails(entry.to_bytes(), tmp_path / "x.plan", 86, ranges=dict(entry.dynamic_inputs))
    assert {d.code for d in error.diagnostics} == {"E0505"}


def test_unknown_targets_and_one_that_lacks_bf16(tmp_path: Path) -> None:
    assert [d.code for d in fails(b"", tmp_path / "x.plan", 90, 75, 120).diagnostics] == ["E0502", "E0503"]


def test_a_plan_that_cannot_be_written(tmp_path: Path) -> None:
    error = fails(_small(), tmp_path / "no such folder" / "x.plan")
    assert (error.diagnostics[0].code, error.exit_code) == ("E0613", ExitCode.FILE)


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    class Interrupting(Recorded):
        def step(self, what: str, done: int = 0, total: int = 0) -> None:
            if what != "Parsing ONNX":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_plan(_small(), tmp_path / "x.plan", load_trt(), sms=(120,), progress=Interrupting())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "sms", [pytest.param((89,), marks=pytest.mark.slow, id="Ada"), pytest.param(PORTABLE, id="portable")]
)
def test_quantized_models_on_older_gpus(sms: tuple[int, ...], tmp_path: Path) -> None:
    """Codes as bytes, decoded by tables: no FP4 or FP8 type is left that one of the GPUs lacks."""
    entry = emit_entry(serve(small_spec(QUANTIZED), lacking=lacking(sms)).program, "decode", batch=1)
    ranges = entry.dynamic_inputs
    result = build_plan(entry.to_bytes(), tmp_path / "x.plan", load_trt(), sms=sms, ranges=ranges)
    verdict = audit(entry.linears, result.kernels, entry.output_names, result.scratch_bytes)
    assert verdict.mismatches == ()
    assert {finding.realised for finding in verdict.findings} == {"nvfp4", "fp8", "bf16"}
    types = {t.dtype for kernel in result.kernels for t in (*kernel.inputs, *kernel.outputs, *kernel.constants)}
    assert "FP4E2M1" not in types and ("FP8" in types) == (sms == (89,))


def _bytes(graph: GraphBuilder) -> bytes:
    import onnx_ir

    data: bytes = onnx_ir.to_proto(graph.model("test")).SerializeToString()
    return data


def _small() -> bytes:
    g = GraphBuilder("g")
    x = g.input("x", DType.F32, (2, 3))
    g.output(g.node("Add", x, x), "y", DType.F32, (2, 3))
    return _bytes(g)
