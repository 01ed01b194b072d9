"""The torch engine on the device against itself on a CPU in float32; errors are ‖a - b‖ / ‖b‖.

specs/tiny.toml has every kind of block, latent experts and multi-token prediction; weights are random. Where
activations are rounded to FP4 or FP8, codes tip here and there, on a CPU as well, the least in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import numpy as np

from n3c.passes.serving import serve
from n3c.runtime.engines.interface import call
from n3c.runtime.engines.torch.model import stored_parameters
from n3c.runtime.engines.torch.open import torch_engine
from n3c.runtime.engines.torch.weights import RandomWeights
from n3c.runtime.generation.capacity import Capacity
from n3c.runtime.generation.drafter import MtpDrafter
from n3c.runtime.generation.loop import Generation
from n3c.runtime.generation.sequence import Options
from n3c.specs.schema import Spec

from .part import Row, Setting, relative_error, report, side_by_side, spec_of

TITLE = "Parity of the engine"
FORMATS = ("nvfp4", "w4a16_nvfp4", "fp8", "bf16")


def run(setting: Setting) -> Iterator[Row]:
    """Yield the errors by format."""
    with ProcessPoolExecutor(side_by_side(), get_context("spawn")) as pool:
        for rows in pool.map(partial(_rows, setting), FORMATS):  # what takes long is compiling
            yield from rows


def _rows(setting: Setting, stored: str) -> list[Row]:
    own: dict[str, object] = {"quantization.format": stored, "quantization.rules": []}
    spec = spec_of("tiny", Setting(setting.device, tiny=True), own)
    try:
        return list(_engine(spec, setting, stored))
    except Exception as error:
        return [{"engine": stored, "error": f"{type(error).__name__}: {error}"[:500]}]


class Copied:
    """Random weights that are drawn on the CPU, so that every device has the same."""

    def __init__(self, spec: Spec) -> None:
        self._source = RandomWeights(stored_parameters(spec))

    def fill(self, parameter: Any, into: Any) -> None:
        """Draw on the CPU and copy."""
        import torch

        drawn = torch.empty(into.shape, dtype=into.dtype)
        self._source.fill(parameter, drawn)
        into.copy_(drawn)


def _engine(spec: Spec, setting: Setting, stored: str) -> Iterator[Row]:
    import torch

    served = serve(spec)
    names = ("prefill", "decode", "verify", "draft")
    exact = torch_engine(served, spec, names, [1], Copied(spec), "cpu", dtype=torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        engine = torch_engine(
            served, spec, names, [1], Copied(spec), "cuda" if setting.device == "cuda" else "cpu", dtype=dtype
        )
        exact.reset()
        errors = {
            entry: relative_error(_outputs(engine, entry, step)["logits"], _outputs(exact, entry, step)["logits"])
            for step, entry in enumerate(
                ("prefill", "decode", "decode", "decode", "verify", "verify", "verify", "draft")
            )
        }
        engine.reset()
        tokens = [_generated(spec, engine, drafter) for drafter in (None, MtpDrafter(), MtpDrafter())]
        yield {
            "engine": stored,
            "activations": str(dtype).removeprefix("torch."),
            **errors,
            "64 greedy tokens with drafts equal those without": tokens[0] == tokens[1] == tokens[2],
            "without a graph": str(dict(engine.unrecorded)),
        }


def _outputs(engine: Any, entry: str, step: int) -> dict[str, Any]:
    random = np.random.default_rng(step)
    ports = engine.signatures[entry].inputs
    inputs: dict[str, Any] = {}
    for name in ports:
        shape = tuple(int(size) for size in ports[name].shape)
        if name.endswith("ids"):
            inputs[name] = random.integers(0, 200, shape)
        elif name == "hidden":
            inputs[name] = random.standard_normal(shape).astype(np.float32)
        else:
            inputs[name] = np.full(
                shape, {"lengths": 0 if entry == "prefill" else 16 + step, "counts": 16, "accepted": 0}[name]
            )
    return call(engine, entry, **inputs)


def _generated(spec: Spec, engine: Any, drafter: Any) -> list[int]:
    prompt = np.random.default_rng(0).integers(0, 200, (1, 20)).tolist()
    made = Generation(engine, prompt, Options(max_new_tokens=64), Capacity.of(spec), drafter=drafter)
    made.run()
    return list(made.result().completions[0].token_ids)


if __name__ == "__main__":
    report(run)
