"""Matrix products as engines compute them, in BF16 where not all states of the model are float32.

The ops of the IR are float32. An engine multiplies stored types where a product has many rows, which `prefill` does,
so what `n3c verify` expects of it is this evaluation: the same numbers are rounded at the same places, and what is
left between the two is the order of sums. Operands and results of all but FP8 products are BF16; activations that
their format rounds are multiplied with their scale after the product, as weights are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from n3c.backends.onnx.entry_forms import LinearForms, bucket_rows, fastest_for, has_wide_products
from n3c.backends.onnx.forms import batches_of
from n3c.backends.onnx.linear_forms import Choose
from n3c.ir import ops
from n3c.ir.program import Call, EntryPoint, Node, Program

from .activations import ACTIVATIONS, can_tip
from .evaluate import Evaluator, by_definition
from .ops import EVALUATORS

NEAR = 1e-5
"""What sums of another order change of a number, relative to the root mean square of its token's: ten times what is
measured."""
NEAR_BF16 = 2**-7
"""The same of a number behind products whose results are BF16, relative to itself: a step of that."""


@dataclass(frozen=True, slots=True)
class Scaled:
    """A weight [..., N, K] or an activation [..., K] in float32 without the scale of its tensor."""

    unscaled: Tensor
    scale: Tensor
    """[] or, of a weight, one an expert [E]."""
    format: str
    narrow: Tensor | None = None
    """Of an activation: the same, rounded from what a product in BF16 takes; a sum rounds the float32 one."""

    @property
    def dense(self) -> Tensor:
        """The numbers with their scale."""
        return self.unscaled * (self.scale[..., None, None] if self.scale.dim() else self.scale)


Operand = Tensor | Scaled


class EngineProducts:
    """Chooses evaluators: engines' products where an engine has a matrix product, definitions elsewhere."""

    def __init__(self, program: Program, batch: int, choose: Choose | None = None) -> None:
        """Take the sequences of a call; `prefill` is built for fewer. `choose` is that of `emit_entry`."""
        self.doubts: dict[str, Tensor] = {}
        """Label of a layer → bool [B, S], of the calls since this was cleared: tokens of which numbers lie so near the
        middle of two neighbours that sums of another order may round them otherwise."""
        self._bf16 = not has_wide_products(program)
        self._forms = {
            name: LinearForms(
                program, entry, {"B": batches_of(name, (batch,))[0], "S": entry.tokens}, choose or fastest_for(program)
            )
            for name, entry in program.entry_points.items()
        }

    def __call__(self, program: Program, entry: EntryPoint, call: Call, node: Node) -> Evaluator:
        """Return the evaluator of a node."""
        if node.op in ops.DEQUANTIZE:
            formals = program.functions[call.function].parameters
            codes = call.parameters[formals.index(node["codes"])]
            return _unscaled(node.op.name, program.parameters[codes].format)
        if node.op is ops.quantize_activation:
            return partial(self._rounded_input, call.label, self._rounds_to_bf16(program, entry, call))
        if node.op is ops.experts:
            return partial(self._experts, call.label)
        if node.op is ops.linear:
            if self._forms[entry.name].rounds(node):
                return self._product
            return lambda x, weight: EVALUATORS["linear"](_dense(x), _dense(weight))
        if node.op is ops.expert_linear:
            return lambda x, indices, weight: EVALUATORS["expert_linear"](_dense(x), indices, _dense(weight))
        return by_definition(program, entry, call, node)

    def formats(self, program: Program, entry: EntryPoint, call: Call) -> set[str]:
        """Return to what a call rounds activations: nvfp4, fp8, bf16; empty where it rounds nothing."""
        function, found = program.functions[call.function], set[str]()
        for node in function.nodes:
            found.update(str(node.attributes[name]) for name in ("format", "inner_format") if name in node.attributes)
        if self._rounds_to_bf16(program, entry, call):
            found.add("bf16")
        return found - {""}

    def _rounds_to_bf16(self, program: Program, entry: EntryPoint, call: Call) -> bool:
        """Whether any linear of a call rounds to BF16."""
        nodes = program.functions[call.function].nodes
        return any(node.op.weights and self._forms[entry.name].rounds(node) for node in nodes)

    def _experts(
        self,
        label: str,
        x: Operand,
        indices: Tensor,
        weights: Tensor,
        up: Operand,
        down: Operand,
        inner_scale: Tensor | None = None,
        *,
        inner_format: str,
    ) -> Tensor:
        """Apply every expert [E, ...] to every token, then sum those that were chosen; by definition what overflows."""

        def finished(active: Tensor, product: Callable[[Operand, Operand], Tensor]) -> Tensor:
            inner: Operand = active
            if inner_scale is not None:
                inner = self._rounded(active, inner_scale, format=inner_format)
                tips = self._tips(active * (1 / inner_scale), inner_format, bf16=self._bf16).any(-1)  # [B, E, S]
                self._doubt(label, tips.transpose(1, 2).gather(2, indices))
            y = product(inner, down).permute(0, 2, 1, 3)  # [B, E, S, N] → [B, S, E, N]
            return y.gather(2, indices.unsqueeze(-1).expand(*indices.shape, y.shape[-1]))

        rows, count = _unsqueezed(x), _dense(up).shape[0]
        raw, scale = self._raw_product(rows, up)
        positive = self._result(rows, up, raw).relu()
        active = self._result(rows, up, positive * positive) * (scale * scale)
        fits = (_ranks(indices, count) < bucket_rows(indices[..., 0].numel(), indices.shape[-1], count)).unsqueeze(-1)
        exact = (_dense(rows) @ _dense(up).mT).relu().square()
        chosen = torch.where(
            fits, finished(active, self._product), finished(exact, lambda x, weight: _dense(x) @ _dense(weight).mT)
        )
        total: Tensor = EVALUATORS["combine_experts"](chosen, weights)
        return total

    def _product(self, x: Operand, weight: Operand) -> Tensor:
        """Return x [..., S, K] times the weight [N, K], or [B, 1 or E, S, K] times the weights [E, N, K]."""
        y, scale = self._raw_product(x, weight)
        return self._result(x, weight, y) * scale

    def _raw_product(self, x: Operand, weight: Operand) -> tuple[Tensor, Tensor]:
        """Return the product of what an engine multiplies, and what it multiplies the result with."""
        matrix, scale = (
            (weight.float(), torch.ones(())) if isinstance(weight, Tensor) else (weight.unscaled, weight.scale)
        )
        rows, x_scale = (x, torch.ones(())) if isinstance(x, Tensor) else (_of_product(x), x.scale)
        if not _is_fp8(x, weight):
            rows, matrix = self._operand(rows), self._operand(matrix)
        return rows @ matrix.mT, x_scale * scale[..., None, None]

    def _result(self, x: Operand, weight: Operand, y: Tensor) -> Tensor:
        """Return y as a product of x and the weight gives it."""
        return y if _is_fp8(x, weight) else self._operand(y)

    def _rounded(self, x: Tensor, scale: Tensor, *, format: str) -> Scaled:
        """Return an activation without its scale; FP4 of a product is rounded from the product's type."""
        divided, rounding = x * (1 / scale), ACTIVATIONS[format]
        narrow = rounding(self._operand(divided)) if format == "nvfp4" else None
        return Scaled(rounding(divided), scale, format, narrow)

    def _rounded_input(self, label: str, bf16: bool, x: Tensor, scale: Tensor, *, format: str) -> Scaled:
        """Round what a linear reads, and note the tokens of which it may be rounded otherwise."""
        self._doubt(label, self._tips(x * (1 / scale), format, bf16=bf16))
        return self._rounded(x, scale, format=format)

    def _tips(self, divided: Tensor, format_: str, *, bf16: bool) -> Tensor:
        distance = NEAR * divided.square().mean(-1, keepdim=True).sqrt()
        return can_tip(divided, distance + NEAR_BF16 * divided.abs() if bf16 else distance, format_)

    def _doubt(self, label: str, tips: Tensor) -> None:
        """Note tokens, given where in [B, S, …] a rounding may tip."""
        tokens = tips.flatten(2).any(-1)
        self.doubts[label] = tokens | self.doubts[label] if label in self.doubts else tokens

    def _operand(self, x: Tensor) -> Tensor:
        """Return float32 x as a product takes or gives it."""
        return x.bfloat16().float() if self._bf16 else x


def _is_fp8(x: Operand, weight: Operand) -> bool:
    return isinstance(x, Scaled) and isinstance(weight, Scaled) and weight.format == "fp8"


def _ranks(indices: Tensor, count: int) -> Tensor:
    """Return how many tokens before it chose the expert of each pair [B, S, K]."""
    flat = indices.flatten(0, 1)
    hits = torch.nn.functional.one_hot(flat, count).sum(1).cumsum(0)
    return (hits.gather(1, flat) - 1).view(indices.shape)


def _of_product(x: Scaled) -> Tensor:
    return x.unscaled if x.narrow is None else x.narrow


def _unscaled(op: str, format_: str) -> Evaluator:
    """Return an evaluator of a dequantization that keeps the scale of the tensor apart."""

    def evaluator(codes: Tensor, *scales: Tensor) -> Scaled:
        *blocks, scale = scales
        return Scaled(EVALUATORS[op](codes, *blocks, torch.ones_like(scale)), scale, format_)

    return evaluator


def _dense(x: Operand) -> Tensor:
    return x.float() if isinstance(x, Tensor) else x.dense


def _unsqueezed(x: Operand) -> Operand:
    """Return [B, S, K] as [B, 1, S, K]."""
    return (
        x.unsqueeze(1)
        if isinstance(x, Tensor)
        else Scaled(x.unscaled.unsqueeze(1), x.scale, x.format, None if x.narrow is None else x.narrow.unsqueeze(1))
    )
