"""The generated PyTorch module as an implementation, with hooks after every layer."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch

from n3c.backends.safetensors.checkpoint import Checkpoint
from n3c.backends.safetensors.sources import load
from n3c.backends.torch.loading import hidden_states
from n3c.ir.source import NegExp, Stack, tensor_names
from n3c.passes.base import run_pipeline
from n3c.passes.lower.model import lower
from n3c.passes.pipelines import quantize_pass
from n3c.passes.widen import Widen
from n3c.runtime.engines.interface import Array
from n3c.specs.schema import Spec

from .implementation import Rounding
from .scenario import Step
from .tolerance import Tolerance, float32
from .trace import Trace


class TorchModule:
    """`Model.step` of a generated package, in float32 with the weights that are deployed, dequantized.

    The module has no drafting entry point: a draft is the whole sequence through the MTP block, and of a
    verification what is not accepted is forgotten by going back to a copy of the state.
    """

    name = "PyTorch"
    rounding: Rounding = "none"
    tolerance: Tolerance = staticmethod(float32)

    def __init__(self, package: Any, spec: Spec, checkpoint: Checkpoint) -> None:
        """Fill the model of a generated package; any exception of its code is passed on."""
        self._model: Any = package.Model().eval()
        _fill(package.named_tensors(self._model), spec, checkpoint)
        self._capacity = spec.serving.max_seq_len
        self._head = "backbone.embeddings" if spec.model.tie_word_embeddings else "lm_head"
        self._seen: dict[str, Array] = {}
        self._watch()
        self.reset()

    def reset(self) -> None:
        """Begin new sequences."""
        self._state: Any = None
        self._ids: Any = None

    def run(self, step: Step, reference: Trace) -> Trace | None:
        """Run the step's tokens through the module."""
        tokens = torch.as_tensor(step.tokens)
        self._seen = {}
        if self._state is None:
            self._state = self._model.allocate_state(len(tokens), self._capacity)
            self._ids = tokens[:, :0]
        with torch.no_grad():
            if step.entry == "draft":
                return self._draft(tokens)
            before = copy.deepcopy(self._state) if step.commits < tokens.shape[1] else None
            logits = self._model.step(tokens, self._state)
            trace = {**self._seen, self._head: logits.numpy()}
            if before is not None:
                self._state = before
                self._model.step(tokens[:, : step.commits], self._state)
        self._ids = torch.cat([self._ids, tokens[:, : step.commits]], dim=1)
        return trace

    def _draft(self, newest: Any) -> Trace:
        """Return what the MTP block gives at the last token of the sequence, `newest` [B, 1] being after it."""
        model, ids = self._model, torch.cat([self._ids, newest], dim=1)
        hidden = hidden_states(model.backbone(ids[:, :-1]))
        hidden = hidden_states(model.mtp(hidden, model.backbone.embeddings(ids[:, 1:])))
        mtp = {label: value[:, -1:] for label, value in self._seen.items() if label.startswith("mtp.")}
        return {**mtp, self._head: model.head(hidden)[:, -1:].numpy()}

    def _watch(self) -> None:
        """Note what every layer gives, under its label in the program."""
        backbone = self._model.backbone
        watched = {"backbone.embeddings": backbone.embeddings, "backbone.norm_f": backbone.norm_f}
        watched |= {f"backbone.layers.{i}": layer for i, layer in enumerate(backbone.layers)}
        if hasattr(self._model, "mtp"):
            watched |= {f"mtp.layers.{i}": layer for i, layer in enumerate(self._model.mtp.layers)}
        for label, layer in watched.items():

            def note(_: Any, __: Any, output: Any, label: str = label) -> None:
                self._seen[label] = hidden_states(output).float().numpy()

            layer.register_forward_hook(note)


def _fill(tensors: dict[str, Any], spec: Spec, checkpoint: Checkpoint) -> None:
    """Copy every weight, dequantized as the deployed codes say, to the tensor of its name in a checkpoint."""
    program = lower(spec)
    run_pipeline(program, [quantize_pass(spec), Widen()])
    with torch.no_grad():
        for parameter in program.parameters.values():
            names = list(tensor_names(parameter.source))
            if isinstance(parameter.source, NegExp):
                values = [checkpoint.read(names[0])]
            else:
                value = load(parameter, checkpoint)
                values = list(value) if len(names) > 1 or _stacked(parameter.source) else [value]
            for name, array in zip(names, values, strict=True):
                tensors[name].copy_(torch.as_tensor(np.array(array, np.float32)))


def _stacked(source: object) -> bool:
    """Whether the source's first dim counts experts."""
    while not isinstance(source, Stack):
        inner = getattr(source, "codes", None) or getattr(source, "operand", None)
        if inner is None:
            return False
        source = inner
    return True
