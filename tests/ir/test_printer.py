"""The text form, as golden files: what lowering and each pass make of a small model."""

from __future__ import annotations

import pytest

from n3c.ir.printer import print_program
from n3c.ir.program import Program
from n3c.passes.pipelines import SERVING
from n3c.passes.serving import serve
from support.golden import assert_golden
from support.specs import QUANTIZED, small_spec


@pytest.mark.parametrize("stage", ["lower", *SERVING])
def test_golden_ir_after(stage: str) -> None:
    texts: dict[str, str] = {}

    def after(name: str, program: Program) -> None:
        texts[name] = print_program(program)

    serve(small_spec(QUANTIZED), after)
    assert_golden(f"ir/small.{stage}.txt", texts[stage])


def test_printing_is_deterministic_and_tells_origins() -> None:
    programs = [serve(small_spec(QUANTIZED)).program for _ in range(2)]
    texts = [print_program(program, origins=True) for program in programs]
    spec_path = r"/tmp/\S+/spec.toml"
    import re

    assert re.sub(spec_path, "SPEC", texts[0]) == re.sub(spec_path, "SPEC", texts[1])
    assert re.search(r"dequantize_nvfp4\(.*# quantize, \S+spec.toml:\d+:\d+", texts[0])
    assert re.search(r"cached_attention\(.*# plan_state", texts[0])
