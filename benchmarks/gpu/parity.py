"""Generated code and torch engine on the device against themselves on a CPU in float32; errors are ‖a - b‖ / ‖b‖.

specs/tiny.toml has every kind of block, latent experts and multi-token prediction; weights are random.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
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

from .part import Row, Setting, generated, report, spec_of
from .train import transformers_model

TITLE = "Parity"


def run(setting: Setting) -> Iterator[Row]:
    """Yield the errors of training by type, then of the engine by format."""
    try:
        yield from _training(setting)
    except Exception as error:
        yield {"training": "failed", "error": f"{type(error).__name__}: {error}"[:500]}
    for stored in ("nvfp4", "fp8", "bf16"):
        own: dict[str, object] = {"quantization.format": stored, "quantization.rules": []}
        spec = spec_of("tiny", Setting(setting.device, tiny=True), own)
        try:
            yield from _engine(spec, setting, stored)
        except Exception as error:
            yield {"engine": stored, "error": f"{type(error).__name__}: {error}"[:500]}


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
    exact = torch_engine(served, spec, names, 1, Copied(spec), "cpu", dtype=torch.float32)
    for dtype in (torch.bfloat16, torch.float32):
        engine = torch_engine(
            served, spec, names, 1, Copied(spec), "cuda" if setting.device == "cuda" else "cpu", dtype=dtype
        )
        exact.reset()
        errors = {
            entry: _error(_outputs(engine, entry, step)["logits"], _outputs(exact, entry, step)["logits"])
            for step, entry in enumerate(
                ("prefill", "decode", "decode", "decode", "verify", "verify", "verify", "draft")
            )
        }
        engine.reset()
        tokens = [_generated(spec, engine, drafter) for drafter in (None, MtpDrafter(), MtpDrafter())]
        yield {
            "engine": f"{stored} weights",
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


def _training(setting: Setting) -> Iterator[Row]:
    import torch

    torch.manual_seed(0)
    spec = spec_of("tiny", Setting(setting.device, tiny=True))
    exact = generated(spec).Model()
    ids = torch.randint(spec.model.vocab_size, (2, 200))
    documents = torch.arange(200).expand(2, -1) // 64
    for packed in (False, True):
        given = {"document_ids": documents} if packed else {}
        want = _results(copy.deepcopy(exact), ids, given)
        for dtype in (torch.float32, torch.bfloat16):
            model = copy.deepcopy(exact).to(setting.device, dtype)
            got = _results(model, ids.to(setting.device), {k: v.to(setting.device) for k, v in given.items()})
            yield {
                "training": "tiny, packed documents" if packed else "tiny",
                "type": str(dtype).removeprefix("torch."),
                **{key: _error(got[key], want[key]) for key in want},
            }
    model = copy.deepcopy(exact).to(setting.device).eval()
    with torch.no_grad():
        whole = model(ids.to(setting.device)).logits
        state = model.allocate_state(2, 256)
        parts = [model.step(part, state) for part in ids.to(setting.device).split([100, *[1] * 20, 80], 1)]
    yield {"model": "step against forward", "logits": _error(torch.cat(parts, 1), whole)}
    theirs = transformers_model(spec).to(setting.device).eval()
    missing = theirs.load_state_dict(
        {name.replace("backbone.", "model.", 1): tensor for name, tensor in model.state_dict().items()}, strict=False
    )
    with torch.no_grad():
        logits = theirs(ids.to(setting.device)).logits
    yield {
        "model": f"forward against transformers, {len(missing.missing_keys)} tensors missing",
        "logits": _error(whole, logits),
    }


def _results(model: Any, ids: Any, given: dict[str, Any]) -> dict[str, Any]:
    import torch

    model.train()
    out = model(ids, labels=ids, **given)
    out.loss.backward()
    gradients = torch.cat([p.grad.flatten().double().cpu() for p in model.parameters() if p.grad is not None])
    return {"logits": out.logits.detach(), "loss": out.loss.detach(), "gradients": gradients}


def _error(a: Any, b: Any) -> float:
    import torch

    a, b = (torch.as_tensor(t).double().cpu() for t in (a, b))
    return float(f"{float((a - b).norm() / b.norm()):.2e}")


if __name__ == "__main__":
    report(run)
