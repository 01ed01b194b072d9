"""Matrix products as engines compute them: activations rounded to what the stored type of the weight multiplies with.

The ops of the IR are float32. An engine multiplies stored types where a product has many rows, which `prefill` does,
so what `n3c verify` expects of it is this evaluation: the same numbers are rounded at the same places, and what is
left between the two is the order of sums. By the format of a weight, as `n3c.backends.onnx.spellings.gemm` documents:

  nvfp4        x / s to E2M1 with an E4M3 scale for 16 elements, s = max|x| of the row / (6 · 448)
  fp8          x / s to E4M3, s = max|x| of the row / 448
  the others   x as it is

Where not all states of the model are float32, operands and results of all but FP8 products are BF16 besides.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from n3c.backends.onnx.forms import batches_of, is_matrix_product
from n3c.ir import ops
from n3c.ir.formats import E2M1_MAX, E4M3_MAX, NVFP4_BLOCK
from n3c.ir.program import Call, EntryPoint, Node, Program
from n3c.ir.types import DType

from .evaluate import Evaluator, by_definition
from .ops import EVALUATORS

E2M1_BOUNDS = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
"""Halfway between neighbours; a value on one of them goes to the neighbour of even code."""
E2M1_VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight [..., N, K] in float32 without the scale of its tensor, [] or one an expert [E]."""

    unscaled: Tensor
    scale: Tensor
    format: str

    @property
    def dense(self) -> Tensor:
        """The weight with its scale."""
        return self.unscaled * self.scale[..., None, None]


class EngineProducts:
    """Chooses evaluators: engines' products where an engine has a matrix product, definitions elsewhere."""

    def __init__(self, program: Program, batch: int) -> None:
        """Take the sequences of a call; `prefill` is built for fewer."""
        self._batch = batch
        self._bf16 = any(state.type.dtype is not DType.F32 for state in program.states.values())

    def __call__(self, program: Program, entry: EntryPoint, call: Call, node: Node) -> Evaluator:
        """Return the evaluator of a node."""
        if node.op in ops.DEQUANTIZE:
            formals = program.functions[call.function].parameters
            codes = call.parameters[formals.index(node["codes"])]
            return _unscaled(node.op.name, program.parameters[codes].format)
        if node.op is ops.experts:
            return self._experts
        if node.op is ops.linear:
            few = not self._is_product(entry, node)
            return lambda x, weight: EVALUATORS["linear"](x, _dense(weight)) if few else self._product(x, weight)
        if node.op is ops.expert_linear:
            return lambda x, indices, weight: EVALUATORS["expert_linear"](x, indices, _dense(weight))
        return by_definition(program, entry, call, node)

    def formats(self, program: Program, entry: EntryPoint, call: Call) -> set[str]:
        """Return to what the products of a call round activations: nvfp4, fp8, bf16; empty where they round nothing."""
        function, found = program.functions[call.function], set[str]()
        names = dict(zip(map(id, function.parameters), call.parameters, strict=True))
        for node in function.nodes:
            for weight in node.weights if node.op.weights and self._is_product(entry, node) else ():
                codes = weight.stored[0]
                parameter = program.parameters.get(names.get(id(codes), ""))
                if parameter is not None and parameter.format in ("nvfp4", "fp8"):
                    found.add(parameter.format)
                elif parameter is not None and self._bf16:
                    found.add("bf16")
        return found

    def _is_product(self, entry: EntryPoint, node: Node) -> bool:
        """Whether an engine computes a node as a matrix product of stored types."""
        (batch,) = batches_of(entry.name, (self._batch,))
        return is_matrix_product(node, {"B": batch, "S": entry.tokens})

    def _experts(
        self, x: Tensor, indices: Tensor, weights: Tensor, up: Tensor | QuantizedWeight, down: Tensor | QuantizedWeight
    ) -> Tensor:
        """Apply every expert [E, ...] to every token, then sum those that were chosen."""
        inner = EVALUATORS["relu2"](self._product(x.unsqueeze(1), up))
        y = self._product(inner, down).permute(0, 2, 1, 3)  # [B, E, S, N] → [B, S, E, N]
        chosen = y.gather(2, indices.unsqueeze(-1).expand(*indices.shape, y.shape[-1]))
        total: Tensor = EVALUATORS["combine_experts"](chosen, weights)
        return total

    def _product(self, x: Tensor, weight: Tensor | QuantizedWeight) -> Tensor:
        """Return x [..., S, K] times the weight [N, K], or [B, 1 or E, S, K] times the weights [E, N, K]."""
        row_scale = torch.ones(())
        matrix, scale, format_ = weight.float() if isinstance(weight, Tensor) else weight.unscaled, None, ""
        if isinstance(weight, QuantizedWeight):
            scale, format_ = weight.scale, weight.format
        if format_ == "nvfp4":
            row_scale = _row_scale(x, E2M1_MAX * E4M3_MAX)
            x = _in_fp4(self._operand(x / row_scale))
        elif format_ == "fp8":
            row_scale = _row_scale(x, E4M3_MAX)
            x = (x / row_scale).to(torch.float8_e4m3fn).float()
        y = x @ matrix.mT if format_ == "fp8" else self._operand(self._operand(x) @ self._operand(matrix).mT)
        return y if scale is None else y * (row_scale * scale[..., None, None])

    def _operand(self, x: Tensor) -> Tensor:
        """Return float32 x as a product takes or gives it."""
        return x.bfloat16().float() if self._bf16 else x


def _unscaled(op: str, format_: str) -> Evaluator:
    """Return an evaluator of a dequantization that keeps the scale of the tensor apart."""

    def evaluator(codes: Tensor, *scales: Tensor) -> QuantizedWeight:
        *blocks, scale = scales
        return QuantizedWeight(EVALUATORS[op](codes, *blocks, torch.ones_like(scale)), scale, format_)

    return evaluator


def _dense(weight: Tensor | QuantizedWeight) -> Tensor:
    return weight if isinstance(weight, Tensor) else weight.dense


def _row_scale(x: Tensor, largest: float) -> Tensor:
    """Return what divides each row so that its largest value becomes `largest`, [..., 1]."""
    peak: Tensor = x.abs().amax(-1, keepdim=True)
    return peak.clamp(min=1e-20) * (1 / largest)


def _in_fp4(x: Tensor) -> Tensor:
    """Return x [..., K] as E2M1 codes times E4M3 scales of 16 hold it."""
    blocks: Tensor = x.unflatten(-1, (-1, NVFP4_BLOCK))
    step = (blocks.abs().amax(-1, keepdim=True) / E2M1_MAX).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn).float()
    ratio = torch.where(step > 0, blocks / step, 0.0).clamp(-E2M1_MAX, E2M1_MAX)
    size = ratio.abs()
    code = torch.bucketize(size, E2M1_BOUNDS)  # a tie goes down, and up where that is the even code
    code += (code < len(E2M1_BOUNDS)) & (code % 2 == 1) & (size == E2M1_BOUNDS[code.clamp(max=6)])
    return (torch.copysign(E2M1_VALUES[code], ratio) * step).flatten(-2)
