"""What holds for every pass of the pipeline."""

from __future__ import annotations

from dataclasses import replace

import pytest

from n3c.ir.printer import print_program
from n3c.ir.types import DType
from n3c.passes.lower.model import lower
from n3c.passes.pipelines import serving_passes
from n3c.passes.widen import Widen
from n3c.specs.blocks import Mlp
from n3c.specs.load import load_spec
from n3c.specs.pattern import Pattern
from support.specs import SPECS


@pytest.mark.parametrize("pattern", ["M", "*", "-", "E", "ME*"])
@pytest.mark.parametrize("lacking", [(), (DType.F4E2M1, DType.F8E4M3)], ids=["blackwell", "ampere"])
def test_a_pass_tells_whether_it_changed_anything(pattern: str, lacking: tuple[DType, ...]) -> None:
    """What it says is what the program's text says, also of a second run."""
    spec = load_spec(SPECS / "tiny.toml")[0]
    spec = replace(spec, model=replace(spec.model, pattern=Pattern.parse(pattern)), mlp=Mlp(96), mtp=None)
    if pattern != "ME*":
        spec = replace(spec, quantization=None)  # whose rules name blocks that are not there
    program = lower(spec)
    for pass_ in (*serving_passes(spec, lacking), Widen()):
        for _ in range(1 if pass_.name == "plan_state" else 2):
            before = print_program(program)
            assert pass_.run(program) == (print_program(program) != before), pass_.name
