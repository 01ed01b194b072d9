"""The router's choice for a few tokens, in float32: what is seven launches in PyTorch.

    s = sigmoid(logits)
    chosen = the K largest of s + bias
    weight_i = scaling s_i / (sum of s over the chosen + 1e-20)

Bytes moved: logits [T, E], nearly none: the time is that of K rounds of finding a maximum. One program a token. A value
and its expert are one integer of 64 bits whose order is that of the values, so a round is one reduction. For routers
without groups of experts (n_group = 1). Of equal values the lower expert comes first; PyTorch leaves the order of
equals open.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import begin, overlapping, power_of_two

LEAST = tl.constexpr(-(2**63))


@triton.jit
def sigmoid(x):
    """Return 1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def router_kernel(
    logits, bias, chosen, weights, E, scaling, K: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr,
    NORMALIZE: tl.constexpr,
):  # fmt: skip
    """Write the K experts and weights of token `program_id(0)`."""
    begin()
    token = tl.program_id(0).to(tl.int64)
    logits += token * E
    experts, places = tl.arange(0, BE), tl.arange(0, BK)
    valid = experts < E
    choice = sigmoid(tl.load(logits + experts, mask=valid, other=0.0).to(tl.float32))
    choice += tl.load(bias + experts, mask=valid, other=0.0).to(tl.float32)
    bits = choice.to(tl.int32, bitcast=True)
    bits ^= (bits >> 31) & 0x7FFFFFFF  # negative numbers have the reverse order as integers
    keys = (bits.to(tl.int64) << 32) | (BE - 1 - experts)
    keys = tl.where(valid, keys, LEAST)
    best = tl.zeros([BK], tl.int32)
    for k in range(K):
        most = tl.max(keys, 0)
        best = tl.where(places == k, BE - 1 - (most & 0xFFFFFFFF).to(tl.int32), best)
        keys = tl.where(keys == most, LEAST, keys)
    weight = sigmoid(tl.load(logits + best, mask=places < K, other=0.0).to(tl.float32))
    weight = tl.where(places < K, weight, 0.0)
    if NORMALIZE:
        weight = weight / (tl.sum(weight, 0) + 1e-20)
    tl.store(chosen + token * K + places, best.to(tl.int64), mask=places < K)
    tl.store(weights + token * K + places, weight * scaling, mask=places < K)


def route(logits: Tensor, bias: Tensor, top_k: int, scaling: float, *, normalize: bool = True) -> tuple[Tensor, Tensor]:
    """Return the experts [T, K] int64 of `logits` [T, E], by descending choice, and their weights [T, K] float32.

    `bias` [E] float32 is added to choose only.
    """
    logits = logits.contiguous()
    tokens, experts = logits.shape
    chosen = torch.empty(tokens, top_k, dtype=torch.int64, device=logits.device)
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=logits.device)
    router_kernel[(tokens,)](
        logits, bias, chosen, weights, experts, scaling, top_k, power_of_two(experts), power_of_two(top_k), normalize,
        num_warps=1, **overlapping(logits),
    )  # fmt: skip
    return chosen, weights
