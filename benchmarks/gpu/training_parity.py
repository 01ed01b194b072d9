"""Generated code on the device against itself on a CPU in float32, and against transformers; errors are ‖a - b‖ / ‖b‖.

specs/tiny.toml has every kind of block, latent experts and multi-token prediction; weights are random.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from .part import Row, Setting, generated, relative_error, report, spec_of
from .train import transformers_model

TITLE = "Parity of training"


def run(setting: Setting) -> Iterator[Row]:
    """Yield the errors by type, of cached steps, and against transformers."""
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
                **{key: relative_error(got[key], want[key]) for key in want},
            }
    model = copy.deepcopy(exact).to(setting.device).eval()
    with torch.no_grad():
        whole = model(ids.to(setting.device)).logits
        state = model.allocate_state(2, 256)
        parts = [model.step(part, state) for part in ids.to(setting.device).split([100, *[1] * 20, 80], 1)]
    yield {"model": "step against forward", "logits": relative_error(torch.cat(parts, 1), whole)}
    theirs = transformers_model(spec).to(setting.device).eval()
    missing = theirs.load_state_dict(
        {name.replace("backbone.", "model.", 1): tensor for name, tensor in model.state_dict().items()}, strict=False
    )
    with torch.no_grad():
        logits = theirs(ids.to(setting.device)).logits
    yield {
        "model": f"forward against transformers, {len(missing.missing_keys)} tensors missing",
        "logits": relative_error(whole, logits),
    }


def _results(model: Any, ids: Any, given: dict[str, Any]) -> dict[str, Any]:
    import torch

    model.train()
    out = model(ids, labels=ids, **given)
    out.loss.backward()
    gradients = torch.cat([p.grad.flatten().double().cpu() for p in model.parameters() if p.grad is not None])
    return {"logits": out.logits.detach(), "loss": out.loss.detach(), "gradients": gradients}


if __name__ == "__main__":
    report(run)
