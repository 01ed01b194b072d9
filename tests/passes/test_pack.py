"""pack: codes as bytes, which mean the same and are the same memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from n3c.ir.formats import as_bytes
from n3c.ir.types import DType, TensorType
from n3c.ir.verify import verify
from n3c.passes.lower.model import lower
from n3c.passes.pack import CODES, Pack
from n3c.passes.serving import serve
from n3c.runtime.engines.reference.evaluate import evaluate, zero_states
from support.programs import load_parameters, random_tensors, save_tensors
from support.specs import QUANTIZED, small_spec, weight_only


def test_types_of_the_same_bytes() -> None:
    """Two codes of e2m1 a byte, 8 bytes a block."""
    for dtype, dims in ((DType.F4E2M1, (3, 8, 2, 8)), (DType.F8E4M3, (3, 8, 32))):
        type_ = TensorType(dtype, (3, 8, 32))
        assert as_bytes(type_) == TensorType(DType.I8, dims)
        assert as_bytes(type_).bytes == type_.bytes
    for type_, reason in ((TensorType(DType.F8E4M3, (8, "S")), "symbolic"), (TensorType(DType.BF16, (8, 8)), "codes")):
        with pytest.raises(ValueError, match=reason):
            as_bytes(type_)


@pytest.mark.parametrize("lacking", [CODES, (DType.F4E2M1,), (DType.F8E4M3,)], ids=["Ampere", "Ada", "FP8 only"])
def test_pack_changes_no_number(lacking: tuple[DType, ...], tmp_path: Path) -> None:
    spec = weight_only(small_spec(QUANTIZED))
    native, packed = serve(spec).program, serve(spec, lacking=lacking).program
    assert not {p.type.dtype for p in packed.parameters.values()} & set(lacking)
    assert all(p.memory == native.parameters[name].memory for name, p in packed.parameters.items())
    checkpoint = save_tensors(random_tensors(lower(spec)), tmp_path)
    ids = torch.tensor([[5], [6]])
    inputs = {"input_ids": ids, "lengths": torch.tensor([0, 3]), "key_positions": torch.arange(4)}
    results = [
        evaluate(p, "decode", inputs, load_parameters(p, checkpoint), zero_states(p, 2)).outputs[0]
        for p in (native, packed)
    ]
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_it_tells_whether_anything_changed() -> None:
    program = serve(small_spec(QUANTIZED)).program
    assert not Pack().run(program)
    pack = Pack(frozenset(CODES))
    assert pack.run(program)
    verify(program)
    assert not pack.run(program)
