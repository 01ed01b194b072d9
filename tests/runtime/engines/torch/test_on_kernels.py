"""The engine over the real kernels, in Triton's interpreter: what each hands to them, all entry points once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from n3c.passes.lower.model import lower
from n3c.passes.serving import serve
from n3c.runtime.engines.interface import Array, Engine, call
from n3c.runtime.engines.torch.engine import TorchEngine
from n3c.runtime.engines.torch.kernel_operations import kernel_operations
from n3c.runtime.engines.torch.operations import MakeOperations
from n3c.runtime.engines.torch.plain import PlainOperations
from n3c.runtime.engines.torch.weights import CheckpointWeights
from support.programs import random_tensors, save_tensors
from support.small_engine import TEXT
from support.specs import QUANTIZED, spec_from_text


def outputs(engine: Engine) -> list[dict[str, Array]]:
    ids, zero, two = np.arange(12).reshape(2, 6), np.zeros(2, np.int64), np.full(2, 2)
    first = call(engine, "verify", input_ids=ids[:, :3], following_ids=ids[:, 1:4], lengths=zero, accepted=zero)
    hidden = first["hidden"][:, 1:2]
    draft = call(engine, "draft", input_ids=ids[:, 2:3], hidden=hidden, lengths=zero + 1)
    again = call(engine, "verify", input_ids=ids[:, 2:5], following_ids=ids[:, 3:6], lengths=two, accepted=two)
    return [first, draft, again, call(engine, "decode", input_ids=ids[:, 2:3], lengths=two)]


def test_kernels_compute_what_pytorch_does(tmp_path: Path) -> None:
    """Float32 activations and states, weights in NVFP4, FP8 and BF16."""
    text = TEXT.replace('"MEM*-E"', '"M*E"').replace("n_group = 4\ntopk_group = 2\n", "")
    spec = spec_from_text(text + QUANTIZED.partition('\n[[quantization.rules]]\nroles = ["moe.shared')[0])
    served, weights = serve(spec), CheckpointWeights(save_tensors(random_tensors(lower(spec)), tmp_path))
    names = tuple(served.program.entry_points)

    def engine(operations: MakeOperations) -> TorchEngine:
        cpu, wide = torch.device("cpu"), torch.float32
        return TorchEngine(served, spec, names, [2], weights, device=cpu, dtype=wide, operations=operations)

    assert kernel_operations() is not PlainOperations
    expected = outputs(engine(PlainOperations))
    for ours, theirs in zip(outputs(engine(kernel_operations())), expected, strict=True):
        for name, value in ours.items():
            np.testing.assert_allclose(value, theirs[name], rtol=0, atol=1e-5 * np.abs(theirs[name]).max())
