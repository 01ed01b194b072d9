"""The estimate of a builder's memory: against what builders of stages of Super have taken, and what it counts."""

from __future__ import annotations

import pytest

from n3c.backends.onnx.emit import emit_entry
from n3c.backends.onnx.stages import balanced, layer_bytes, stages
from n3c.backends.trt.builder_memory import BUILDER_COPIES, builder_bytes
from n3c.passes.serving import serve
from n3c.specs.load import loaded
from n3c.specs.shipped import spec_file
from support.specs import QUANTIZED, small_spec

MEASURED = {("decode", 1): 0.82, ("verify", 8): 1.25, ("prefill", 1): 1.76}
"""Entry point and batch size → GB (10^9 bytes) that the builder of the largest of four stages took at most."""


def test_stages_of_super_take_what_is_estimated() -> None:
    spec, _ = loaded(spec_file("super"))
    program = serve(spec).program
    starts = balanced(layer_bytes(program, len(spec.model.pattern), batch=8), 4)
    for (name, batch), taken in MEASURED.items():
        _, first = next(iter(stages(program, program.entry_points[name], starts)))
        assert builder_bytes(emit_entry(program, first, batch=batch)) / 1e9 == pytest.approx(taken, rel=0.12), name


def test_embedded_weights_are_held_several_times() -> None:
    program = serve(small_spec(QUANTIZED)).program
    entry = emit_entry(program, "decode", batch=1)
    weights = sum(parameter.type.bytes for parameter in entry.parameters)
    assert builder_bytes(entry, embedded=True) == builder_bytes(entry) + BUILDER_COPIES * weights


def test_what_a_loop_holds_counts_more() -> None:
    """Buckets overflow at 256 tokens, of which 8 fit: the graphs differ by little but the Loop."""
    program = serve(small_spec(QUANTIZED)).program
    short, long = (emit_entry(program, "prefill", batch=1, tokens=tokens) for tokens in (8, 256))
    outside = len(long.model.graph) - len(short.model.graph)
    within = sum(1 for _ in long.model.graph.all_nodes()) - len(long.model.graph)
    assert within > 50
    assert builder_bytes(long) - builder_bytes(short) > 4 * 150_000 * within + 150_000 * outside
