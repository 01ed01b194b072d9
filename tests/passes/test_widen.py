"""widen: the float32 form gives the numbers of the quantized program, and has no narrow type."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from n3c.ir.printer import print_program
from n3c.ir.types import DType
from n3c.passes.base import run_pipeline
from n3c.passes.lower.model import lower
from n3c.passes.pack import CODES
from n3c.passes.serving import serve
from n3c.passes.widen import Widen
from n3c.runtime.engines.reference.evaluate import evaluate, zero_states
from support.programs import load_parameters, random_tensors, save_tensors
from support.specs import QUANTIZED, small_spec


@pytest.mark.parametrize("lacking", [(), CODES], ids=["codes", "bytes"])
def test_a_copy_means_the_same_and_the_original_stays(lacking: tuple[DType, ...], tmp_path: Path) -> None:
    spec = small_spec(QUANTIZED)
    program = serve(spec, lacking=lacking).program
    before = print_program(program)
    wide = program.extract(program.entry_points["decode"])
    (report,) = run_pipeline(wide, [Widen()])
    assert report.changed
    assert print_program(program) == before
    assert list(wide.entry_points) == ["decode"]
    assert {p.type.dtype for p in wide.parameters.values()} == {DType.F32}
    assert not any(node.op.name.startswith("dequantize") for f in wide.functions.values() for node in f.nodes)
    checkpoint = save_tensors(random_tensors(lower(spec)), tmp_path)
    inputs = {"input_ids": torch.tensor([[5], [6]]), "lengths": torch.tensor([0, 3]), "key_positions": torch.arange(4)}
    results = [
        evaluate(p, "decode", inputs, load_parameters(p, checkpoint), zero_states(p, 2)).outputs[0]
        for p in (program, wide)
    ]
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_what_is_wide_stays() -> None:
    program = serve(small_spec(QUANTIZED)).program
    assert Widen().run(program)
    assert not Widen().run(program)
