"""The two descriptions of a model side by side: the generated module, and `forward` evaluated op by op."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from n3c.backends.torch import emit as torch_backend
from n3c.backends.torch.loading import load_package
from n3c.ir.program import Program
from n3c.ir.source import NegExp, Source, Stack
from n3c.ir.source import Tensor as Stored
from n3c.passes.lower.model import lower
from n3c.runtime.engines.reference.evaluate import evaluate
from n3c.specs.schema import Spec

from .programs import random_tensors, save_tensors

TOKENS = 11
"""Of each of two sequences; no multiple of a chunk."""
TOLERANCE = 5e-4
"""Of the largest value of a tensor, in float32: of 150 random specs half stay within 1e-6, and the worst at 6e-5."""
SMALLEST = 1e-3
"""Of the largest gradient: what is smaller may be rounding alone, as of a router whose one weight is s / s."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Logits, one tensor a prediction depth and the loss, and the gradients by names in the checkpoint."""

    values: dict[str, Tensor]
    gradients: dict[str, Tensor]


def generated(spec: Spec, ids: Tensor, folder: Path) -> Outcome:
    """Run the module that the templates make, on the checkpoint in `folder`."""
    module = load_package(torch_backend.emit(spec, "0" * 64))
    model = module.Model()
    module.load_checkpoint(model, folder)
    output = model(ids)
    values = {"logits": output.logits}
    values |= {f"mtp{k}.logits": logits for k, logits in enumerate(output.mtp_logits)}
    loss = model(ids, labels=ids, return_logits=False).loss
    loss.backward()
    with torch.no_grad():  # the gradients take the place of the weights, and so get the names of the checkpoint
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, f"{name} has no gradient"
            parameter.copy_(parameter.grad)
    buffers = dict(model.named_buffers())
    gradients = {name: tensor for name, tensor in module.named_tensors(model).items() if name not in buffers}
    return Outcome({**values, "loss": loss}, gradients)


def evaluated(spec: Spec, program: Program, ids: Tensor, tensors: dict[str, Tensor]) -> Outcome:
    """Run `forward` op by op."""
    leaves = {name: tensor.float().requires_grad_() for name, tensor in tensors.items()}
    parameters = {name: _from_source(p.source, leaves) for name, p in program.parameters.items()}
    logits, *ahead = evaluate(program, "forward", {"input_ids": ids}, parameters).outputs
    values = {"logits": logits}
    values |= {f"mtp{k}.logits": predicted[:, : -k - 1] for k, predicted in enumerate(ahead)}
    loss = _loss(logits, ids, 1)
    if spec.mtp is not None:
        losses = [_loss(predicted, ids, k) for k, predicted in enumerate(ahead, start=2)]
        loss = loss + spec.mtp.loss_scaling_factor * sum(losses) / len(losses)
    loss.backward()
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return Outcome({**values, "loss": loss}, gradients)


def _loss(logits: Tensor, ids: Tensor, ahead: int) -> Tensor:
    return F.cross_entropy(logits[:, :-ahead].flatten(0, 1), ids[:, ahead:].flatten())


def _from_source(source: Source, leaves: dict[str, Tensor]) -> Tensor:
    """Return the parameter that a source makes, in a form that gradients pass."""
    match source:
        case Stored(name):
            return leaves[name]
        case NegExp(inner):
            return -_from_source(inner, leaves).exp()
        case Stack(pattern, count):
            return torch.stack([leaves[pattern.replace("*", str(index))] for index in range(count)])
        case _:
            raise NotImplementedError(f"lowering makes no {source}")


def differences(spec: Spec, folder: Path) -> list[str]:
    """Return what the two say differently."""
    program = lower(spec)
    tensors = random_tensors(program)
    save_tensors(tensors, folder)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(spec.model.vocab_size, (2, TOKENS), generator=generator)
    theirs, ours = generated(spec, ids, folder), evaluated(spec, program, ids, tensors)
    assert theirs.values.keys() == ours.values.keys()
    assert theirs.gradients.keys() == ours.gradients.keys()
    found = {name: _error(theirs.values[name], value) for name, value in ours.values.items()}
    least = SMALLEST * max(float(value.abs().max()) for value in ours.gradients.values())
    found |= {
        f"gradient of {name}": _error(theirs.gradients[name], value, least) for name, value in ours.gradients.items()
    }
    return [f"{name}: {error:.1e}" for name, error in found.items() if not error <= TOLERANCE]


def _error(one: Tensor, other: Tensor, least: float = 1e-20) -> float:
    return ((one - other).abs().max() / other.abs().max().clamp(min=least)).item()
