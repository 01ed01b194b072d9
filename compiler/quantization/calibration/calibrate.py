"""Calibration: the largest magnitude of what every linear reads, as ModelOpt's max calibration finds it.

One value for all routed experts of a layer and projection, over the tokens that are routed to any
of them (ModelOpt's convention); for an FP8 KV cache also the largest key and value. The generated
model computes in float32 and unquantized, part by part: the activations of all sequences pass
through a block while its weights are in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from n3c.backends.progress import Progress
from n3c.backends.torch.loading import hidden_states
from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError

from .streamed_model import StreamedModel, batches

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True)
class Amax:
    """Largest magnitudes over the calibration tokens."""

    inputs: dict[str, float] = field(default_factory=dict[str, float])
    """Module → that of its input; `….experts.*.up_proj` stands for all experts of a layer."""
    cache: dict[str, float] = field(default_factory=dict[str, float])
    """`….k_proj` or `….v_proj` → that of its output, which the KV cache holds."""


Keep = Callable[[str, "Tensor"], None]
"""Called with the name of a block and its input [N, L, D], before the block runs."""


def calibrate(model: StreamedModel, ids: Tensor, progress: Progress, *, mtp: bool, keep: Keep | None = None) -> Amax:
    """Run `ids` [N, L] through the model and return the magnitudes of trunk and head, with `mtp` of the MTP block.

    Raises N3CError (exit code 6) for a checkpoint that does not fit, (exit code 5) for activations
    that are not finite.
    """
    import torch

    amax = Amax()
    parts = [*model.blocks, "lm_head"]
    with torch.no_grad():
        with model.loaded("backbone.embeddings") as (embeddings,):
            x = embeddings(ids)
        for done, name in enumerate(model.blocks):
            progress.step(name, done, len(parts))
            if keep is not None:
                keep(name, x)
            with model.loaded(name) as (block,), recorded(model, name, block, amax):
                for part in batches(ids):
                    x[part] = hidden_states(block(x[part]))
        progress.step("lm_head", len(parts) - 1, len(parts))
        if keep is not None:
            keep("head", x)
        _ends(model, ids, x, amax, mtp=mtp)
    for name, value in (*amax.inputs.items(), *amax.cache.items()):
        if not math.isfinite(value):
            message = f"the calibration tokens give {value} at `{name}`"
            raise N3CError(Diagnostic("E0409", message, help="are these the weights of this spec?"), ExitCode.NUMERICS)
    return amax


def _ends(model: StreamedModel, ids: Tensor, x: Tensor, amax: Amax, *, mtp: bool) -> None:
    """Run what follows the last block, whose output is x [N, L, D]."""
    names = list(dict.fromkeys([*model.head_parts, *(("mtp", "backbone.embeddings") if mtp else ())]))
    with model.loaded(*names) as parts, ExitStack() as recording:
        for name, part in zip(names, parts, strict=True):
            recording.enter_context(recorded(model, name, part, amax))
        for part in batches(ids):
            h = parts[0](x[part])
            model.model.head(h)
            if mtp:
                for ahead in mtp_hidden(model, h, ids[part]):
                    model.model.head(ahead)


def mtp_hidden(model: StreamedModel, h: Tensor, ids: Tensor) -> Iterator[Tensor]:
    """Yield the hidden states [N, L - k, D] of each prediction step k, from those of the trunk [N, L, D]."""
    depth = model.spec.mtp.depth if model.spec.mtp is not None else 0
    for k in range(1, min(depth, ids.shape[1] - 1) + 1):
        h = hidden_states(model.model.mtp(h[:, :-1], model.model.backbone.embeddings(ids[:, k:])))
        yield h


@contextmanager
def recorded(model: StreamedModel, name: str, part: Any, amax: Amax) -> Iterator[None]:
    """Record what the linears of a part read, while inside."""
    from torch import nn

    def note(table: dict[str, float], key: str, value: Tensor) -> None:
        if value.numel():
            largest = float(value.detach().abs().max())
            known = table.get(key, 0.0)
            table[key] = largest if math.isnan(largest) else max(known, largest)

    handles: list[Any] = []
    stacks: dict[int, str] = {}  # where the weights of experts lie → their name
    for inner, module in part.named_modules():
        full = f"{name}.{inner}" if inner else name
        if isinstance(module, nn.Linear):
            handles.append(
                module.register_forward_pre_hook(lambda _, args, full=full: note(amax.inputs, full, args[0]))
            )
            if full.endswith((".k_proj", ".v_proj")):
                handles.append(module.register_forward_hook(lambda _, __, y, full=full: note(amax.cache, full, y)))
        elif type(module).__name__ == "Experts":
            stacks[module.up_proj.data_ptr()] = f"{full}.*.up_proj"
            stacks[module.down_proj.data_ptr()] = f"{full}.*.down_proj"

    def noted(x: Tensor, weight: Tensor) -> Tensor:
        if weight.data_ptr() in stacks:
            note(amax.inputs, stacks[weight.data_ptr()], x)
        return x

    try:
        with model.experts_reading(noted):
            yield
    finally:
        for handle in handles:
            handle.remove()
