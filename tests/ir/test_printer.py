"""The text form, as golden files: what lowering and each pass make of a small model."""

from __future__ import annotations

import pytest

from n3c.ir.printer import print_program
from n3c.ir.program import Program
from n3c.passes.pack import CODES
from n3c.passes.pipelines import DUMPED
from n3c.passes.serving import serve
from support.golden import assert_golden
from support.specs import QUANTIZED, small_spec


@pytest.mark.parametrize("stage", DUMPED)
def test_golden_ir_after(stage: str) -> None:
    texts: dict[str, str] = {}

    def after(name: str, program: Program) -> None:
        texts[name] = print_program(program)

    serve(small_spec(QUANTIZED), after, lacking=CODES if stage == "pack" else ())
    assert_golden(f"ir/small.{stage}.txt", texts[stage])


def test_printing_is_deterministic_and_tells_origins() -> None:
    programs = [serve(small_spec(QUANTIZED)).program for _ in range(2)]
    texts = [print_program(program, origins=True) for program in programs]
    spec_path = r"/tmp/\S+/spec.toml"
    import re

    assert re.sub(spec_path, "SPEC", texts[0]) == re.sub(spec_path, "SPEC", texts[1])
    assert re.search(r"dequantize_nvfp4\(.*# quantize, \S+spec.toml:\d+:\d+", texts[0])
    assert re.search(r"cached_attention\(.*# plan_state", texts[0])


def swapped(program: Program, bound: str) -> str:
    """Return the text form with two bindings of the second call exchanged."""
    names = getattr(program.entry_points["decode"].calls[1], bound)
    names[0], names[1] = names[1], names[0]
    return print_program(program)


@pytest.mark.parametrize("bound", ["parameters", "states", "inputs"])
def test_a_call_shows_what_it_binds(bound: str) -> None:
    """Two programs that differ in nothing but the order of what one call binds have different texts."""
    program, other = (serve(small_spec(QUANTIZED)).program for _ in range(2))
    if bound == "inputs":
        for p in (program, other):
            p.entry_points["decode"].calls[1].inputs.append("lengths")
    assert print_program(program) == print_program(other)
    assert print_program(program) != swapped(other, bound)


def test_a_binding_under_another_name_is_told() -> None:
    """Below its label a parameter has the name of the formal; the MTP block reads the model's embedding."""
    text = print_program(serve(small_spec()).program)
    assert "\n      param embeddings.weight=backbone.embeddings.weight, enorm.weight" in text
    assert "at backbone.layers.0\n      param norm.weight, mixer.in_proj.weight" in text
    assert "\n      state conv_state, ssm_state\n" in text
