"""Values for every input and state that an entry point of serving may take."""

from __future__ import annotations

import torch
from torch import Tensor

from n3c.backends.onnx.emit import OnnxEntry
from n3c.ir.program import Program
from n3c.runtime.engines.reference.evaluate import zero_states

BATCH = 2


def arguments(entry: OnnxEntry, program: Program, *, vocabulary: int, width: int) -> dict[str, Tensor]:
    """Return random ids and a state of random values for each sequence, at different lengths of up to 4 tokens."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocabulary, (BATCH, 65), generator=generator)
    tokens = next(b.shape[1] for b in entry.arguments if b.name == "input_ids")
    known = {
        "input_ids": ids[:, :tokens],
        "following_ids": ids[:, 1 : tokens + 1],
        "lengths": torch.tensor([2, 4]),
        "counts": torch.tensor([tokens, tokens // 2]),
        "accepted": torch.tensor([1, 0]),
        "key_positions": torch.arange(tokens + 4),
        "hidden": torch.randn(BATCH, 1, width, generator=generator),
    }
    states = {
        name: (torch.randn(state.shape, generator=generator) / 4).to(state.dtype)
        for name, state in zero_states(program, BATCH).items()
    }
    return {b.name: states[b.name] if b.kind == "state" else known[b.name] for b in entry.arguments}
