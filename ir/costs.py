"""Counts of work that several stages share: operations of a node, experts that tokens choose."""

from __future__ import annotations

from . import ops
from .program import Node


def node_flops(node: Node, context: int) -> int:
    """Return the FLOPs of a node for one token that attends to `context` tokens; a multiply-add is two.

    Counted are linears, convolutions, the SSD recurrence and attention (4 · context · Hq · P).
    """
    if node.op in (ops.attention, ops.cached_attention):
        width = node["q"].type.dims[-1]
        return 4 * context * width if isinstance(width, int) else 0
    if node.op.flops is None:
        return 0
    operands = {name: v.type if v else None for name, v in node.named_operands.items()}
    return node.op.flops(operands, tuple(r.type for r in node.results), node.attributes)


def distinct_experts(experts: int, top_k: int, tokens: int) -> float:
    """Return how many of `experts` different ones `tokens` meet that choose `top_k` each, by expectation.

    E (1 - (1 - K/E)^T), where tokens choose independently: 152 of 512 for 8 tokens of 22.
    """
    return experts * (1 - (1 - top_k / experts) ** tokens)
