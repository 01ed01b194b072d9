"""Sensitivity from data: how much quantizing a linear moves the loss, to second order.

    score(unit, format) = 1/T Σ (∂L/∂y · (y_q - y))²      over tokens and channels of y

This is the score of AutoQuantize (nvidia-modelopt 0.47, `AutoQuantizeGradientSearcher`): Taylor's
second term with the Fisher information in place of the Hessian. y_q is the output with weights and,
where the format quantizes them, activations quantized; each product is clamped to ±1e10. For routed
experts y is what they give together, before the latent up-projection. L is the sum over tokens of
the cross-entropy, T their number, so that neither the batch nor the length of the calibration
changes the scale.

Gradients flow back part by part, with the weights of one part in memory: the inputs of the blocks
were kept on disk by the calibration, and every block runs again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from n3c.backends.progress import Progress
from n3c.backends.torch.loading import hidden_states
from n3c.compiler.quantization.calibration.calibrate import Amax, mtp_hidden
from n3c.compiler.quantization.calibration.streamed_model import StreamedModel, batches
from n3c.compiler.quantization.units import Unit

from . import fake_quant
from .noise import Scores

if TYPE_CHECKING:
    from torch import Tensor

_HEAD_TOKENS = 1024
"""Tokens of a batch at the head, whose logits are as wide as the vocabulary."""
_CLAMP = 1e10


class KeptInputs:
    """The inputs of the blocks, in a temporary folder; a context manager."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="n3c-calibration-")

    def __enter__(self) -> KeptInputs:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def keep(self, name: str, x: Tensor) -> None:
        """Write the input of a block."""
        import numpy as np

        np.save(self._path(name), x.numpy())

    def read(self, name: str) -> Tensor:
        """Return the input of a block."""
        import numpy as np
        import torch

        return torch.from_numpy(np.load(self._path(name)))

    def _path(self, name: str) -> Path:
        return Path(self._folder.name) / f"{name}.npy"


def second_order_scores(
    model: StreamedModel,
    units: Sequence[Unit],
    progress: Progress,
    *,
    ids: Tensor,
    kept: KeptInputs,
    amax: Amax,
    block_rows: int,
) -> Scores:
    """Return the score of every unit in each of its formats, BF16 at 0.

    `ids` [N, L], the inputs `kept` and the magnitudes `amax` are those of the calibration; `block_rows` is 1 or 16.

    Needs memory for three copies of the largest part's weights in float32.
    """
    scorer = _Scorer(model, units, amax, block_rows)
    progress.step("head", 0, len(model.blocks) + 1)
    gradient = _head(scorer, ids, kept.read("head"))
    for done, name in enumerate(reversed(model.blocks), start=1):
        progress.step(name, done, len(model.blocks) + 1)
        x = kept.read(name)
        with model.loaded(name) as (block,), scorer.watching(name, block):
            for part in batches(ids):
                x[part] = _gradient(x[part], partial(_weighted, block, gradient[part]))
        gradient = x
    return {
        unit.name: {format_: scorer.total[unit.name].get(format_, 0.0) / ids.numel() for format_ in unit.formats}
        for unit in units
    }


def _head(scorer: _Scorer, ids: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of the loss with respect to the output x [N, L, D] of the last block."""
    model = scorer.model
    mtp = model.spec.mtp if any(name.startswith("mtp.") for name in scorer.unit_of) else None
    names = list(dict.fromkeys([*model.head_parts, *(("mtp", "backbone.embeddings") if mtp else ())]))

    def loss(tokens: Tensor, h: Tensor) -> Tensor:
        h = model.model.backbone.norm_f(h)
        total = _cross_entropy(model.model.head(h)[:, :-1], tokens[:, 1:])
        if mtp is not None:
            for k, ahead in enumerate(mtp_hidden(model, h, tokens), start=1):
                one = _cross_entropy(model.model.head(ahead)[:, :-1], tokens[:, k + 1 :])
                total = total + mtp.loss_scaling_factor / mtp.depth * one
        return total

    with model.loaded(*names) as parts, ExitStack() as watching:
        for name, part in zip(names, parts, strict=True):
            watching.enter_context(scorer.watching(name, part))
        for part in batches(ids, _HEAD_TOKENS):
            x[part] = _gradient(x[part], partial(loss, ids[part]))
    return x


def _weighted(block: Any, gradient: Tensor, x: Tensor) -> Tensor:
    """Return a scalar whose gradient is that of the loss, from the gradient after the block."""
    total: Tensor = (hidden_states(block(x)) * gradient).sum()
    return total


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    from torch.nn.functional import cross_entropy

    return cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


def _gradient(x: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    import torch

    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(x), x)
    return gradient


class _Scorer:
    """Adds up the scores of the linears of the parts that it watches."""

    def __init__(self, model: StreamedModel, units: Sequence[Unit], amax: Amax, block_rows: int) -> None:
        self.model = model
        self.amax = amax
        self.block_rows = block_rows
        self.unit_of = {linear.module: unit for unit in units for linear in unit.linears}
        self.total: dict[str, dict[str, float]] = {unit.name: {} for unit in units}

    def add(self, unit: Unit, format_: str, gradient: Tensor, difference: Tensor) -> None:
        """Add (∂L/∂y · (y_q - y))² of one batch."""
        score = float((gradient * difference).clamp(-_CLAMP, _CLAMP).double().square().sum())
        self.total[unit.name][format_] = self.total[unit.name].get(format_, 0.0) + score

    @contextmanager
    def watching(self, name: str, part: Any) -> Iterator[None]:
        """Score the linears of a loaded part whenever gradients pass through it, while inside."""
        from torch import nn

        handles: list[Any] = []
        for inner, module in part.named_modules():
            full = f"{name}.{inner}" if inner else name
            if isinstance(module, nn.Linear) and full in self.unit_of:
                handles.append(module.register_forward_hook(self._linear(full, module)))
            elif f"{full}.*.up_proj" in self.unit_of:
                handles.append(module.register_forward_hook(self._experts(full, module)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _weights(self, unit: Unit, weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Return format → name → quantized weight."""
        return {
            format_: {
                name: fake_quant.weight(weight.detach(), format_, self.block_rows) for name, weight in weights.items()
            }
            for format_ in unit.formats
            if format_ != "bf16"
        }

    def _linear(self, name: str, module: Any) -> Callable[..., None]:
        import torch
        from torch.nn.functional import linear

        unit = self.unit_of[name]
        quantized = self._weights(unit, {name: module.weight})

        def score(gradient: Tensor, x: Tensor, y: Tensor) -> None:
            with torch.no_grad():
                for format_, weights in quantized.items():
                    read = fake_quant.activation(x, format_, self.amax.inputs[name])
                    self.add(unit, format_, gradient, linear(read, weights[name]) - y)

        def hook(_: Any, arguments: tuple[Tensor, ...], y: Tensor) -> None:
            if y.requires_grad:
                x, before = arguments[0].detach(), y.detach()
                y.register_hook(lambda gradient: score(gradient, x, before))

        return hook

    def _experts(self, name: str, module: Any) -> Callable[..., None]:
        import torch

        ups, downs = f"{name}.*.up_proj", f"{name}.*.down_proj"
        unit = self.unit_of[ups]
        quantized = self._weights(unit, {ups: module.up_proj, downs: module.down_proj})

        def score(gradient: Tensor, arguments: tuple[Tensor, ...], y: Tensor) -> None:
            with torch.no_grad():
                for format_, weights in quantized.items():
                    with self._swapped(module, weights[ups], weights[downs], format_, name):
                        self.add(unit, format_, gradient, module(*arguments) - y)

        def hook(_: Any, arguments: tuple[Tensor, ...], y: Tensor) -> None:
            if y.requires_grad:
                inputs, before = tuple(argument.detach() for argument in arguments), y.detach()
                y.register_hook(lambda gradient: score(gradient, inputs, before))

        return hook

    @contextmanager
    def _swapped(self, experts: Any, up: Tensor, down: Tensor, format_: str, name: str) -> Iterator[None]:
        """Compute with quantized experts, and quantized inputs of them, while inside."""
        before = experts.up_proj.data, experts.down_proj.data
        amax = {
            up.data_ptr(): self.amax.inputs[f"{name}.*.up_proj"],
            down.data_ptr(): self.amax.inputs[f"{name}.*.down_proj"],
        }

        def quantized(x: Tensor, weight: Tensor) -> Tensor:
            return fake_quant.activation(x, format_, amax[weight.data_ptr()])

        try:
            experts.up_proj.data, experts.down_proj.data = up, down
            with self.model.experts_reading(quantized):
                yield
        finally:
            experts.up_proj.data, experts.down_proj.data = before
