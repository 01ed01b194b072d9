"""The rounded activations of one sequence, written down on one road through a model and compared on another."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from n3c.ir import ops
from n3c.ir.program import Call, EntryPoint, Node, Program
from n3c.runtime.engines.reference import ops as reference
from n3c.runtime.engines.reference.evaluate import Evaluator, by_definition


class Roundings:
    """What linears read after rounding, and which experts were chosen, for every token of one sequence.

    It is the choice of evaluators of a reference engine. With `given`, linears read what they read on that road, and
    `tipped` counts where this one would have rounded otherwise: so no tipped rounding makes others tip.
    """

    def __init__(self, tokens: int, given: Roundings | None = None) -> None:
        """Take the most tokens that the sequence will have."""
        self.given = given
        self.rounded = 0
        self.tipped = 0
        self._tokens = tokens
        self._places = range(0)
        self._kept: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}

    def at(self, places: range) -> None:
        """Say which tokens of the sequence the next call takes; further ones are padding."""
        self._places = places

    def __call__(self, program: Program, entry: EntryPoint, call: Call, node: Node) -> Evaluator:
        """Return the evaluator of a node."""
        defined = by_definition(program, entry, call, node)
        if node.op in ops.DEQUANTIZE:
            return self._dequantized(program.bound(call, node["codes"]).name, defined)
        if node.op is ops.quantize_activation:
            name = program.bound(call, node["scale"]).name
            return lambda *operands, **attributes: self._noted(name, defined(*operands, **attributes))
        if node.op is ops.experts and node.get("inner_scale") is not None:
            return self._experts(program.bound(call, node["inner_scale"]).name)
        if node.op is ops.route:
            return self._routed(f"{call.label}.experts", defined)
        return defined

    def share_of(self, other: Roundings) -> float:
        """Return the share of roundings that the two roads, each by itself, do not have in common."""
        names = [name for name in self._kept if not name.endswith(".experts")]
        differ = sum(int((self._kept[name] != other._kept[name]).sum()) for name in names)
        return differ / sum(self._kept[name].numel() for name in names)

    def choices_apart(self, other: Roundings) -> int:
        """Return how many tokens have another expert in some layer than on the other road."""
        names = [name for name in self._kept if name.endswith(".experts")]
        return int(torch.stack([(self._kept[name] != other._kept[name]).any(-1) for name in names]).any(0).sum())

    def _dequantized(self, name: str, defined: Evaluator) -> Evaluator:
        """Return an evaluator that dequantizes a weight once."""

        def evaluator(*operands: Tensor) -> Tensor:
            if name not in self._weights:
                self._weights[name] = defined(*operands)
            return self._weights[name]

        return evaluator

    def _experts(self, scale_name: str) -> Evaluator:
        """Return the definition of `experts`, its inner rounding noted."""

        def evaluator(
            x: Tensor,
            indices: Tensor,
            weights: Tensor,
            up: Tensor,
            down: Tensor,
            inner_scale: Tensor,
            *_: Tensor | None,
            inner_format: str,
        ) -> Tensor:
            inner = reference.relu2(reference.expert_linear(x.unsqueeze(-2), indices, up))
            rounded = self._noted(scale_name, reference.quantize_activation(inner, inner_scale, format=inner_format))
            return reference.combine_experts(reference.expert_linear(rounded, indices, down), weights)

        return evaluator

    def _routed(self, name: str, defined: Callable[..., tuple[Tensor, Tensor]]) -> Evaluator:
        def evaluator(*operands: Tensor, **attributes: object) -> tuple[Tensor, Tensor]:
            indices, weights = defined(*operands, **attributes)
            self._keep(name, indices.sort(-1).values)
            return indices, weights

        return evaluator

    def _noted(self, name: str, values: Tensor) -> Tensor:
        """Keep the values [1, S, …] of the tokens of the call; return those that linears read."""
        own = self._keep(name, values)
        if self.given is None:
            return values
        given = self.given._kept[name][self._places.start : self._places.stop]
        self.rounded += own.numel()
        self.tipped += int((given != own).sum())
        read = values.clone()
        read[0, : len(self._places)] = given.view(read[0, : len(self._places)].shape)
        return read

    def _keep(self, name: str, values: Tensor) -> Tensor:
        own = values[0, : len(self._places)].flatten(1)
        kept = self._kept.setdefault(name, own.new_zeros(self._tokens, own.shape[1]))
        kept[self._places.start : self._places.stop] = own
        return own
