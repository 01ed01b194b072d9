"""The router's choice for a few tokens, in float32: what is seven launches in PyTorch.

    s = sigmoid(logits)
    chosen = the K largest of s + bias
    weight_i = scaling s_i / (sum of s over the chosen + 1e-20)

Bytes moved: logits [T, E], nearly none: the time is that of K rounds of finding a maximum. One program a token. For
routers without groups of experts (n_group = 1). Of equal values the lower expert comes first; PyTorch leaves the order
of equals open.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import power_of_two


@triton.jit
def router_kernel(
    logits, bias, chosen, weights, E, scaling, K: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr,
    NORMALIZE: tl.constexpr,
):  # fmt: skip
    """Write the K experts and weights of token `program_id(0)`."""
    token = tl.program_id(0).to(tl.int64)
    experts, places = tl.arange(0, BE), tl.arange(0, BK)
    valid = experts < E
    scores = 1.0 / (1.0 + tl.exp(-tl.load(logits + token * E + experts, mask=valid, other=0.0).to(tl.float32)))
    choice = tl.where(valid, scores + tl.load(bias + experts, mask=valid, other=0.0).to(tl.float32), -float("inf"))
    best = tl.zeros([BK], tl.int32)
    weight = tl.zeros([BK], tl.float32)
    for k in range(K):
        most = tl.max(choice, 0)
        expert = tl.min(tl.where(choice == most, experts, BE), 0)
        best = tl.where(places == k, expert, best)
        weight = tl.where(places == k, tl.sum(tl.where(experts == expert, scores, 0.0), 0), weight)
        choice = tl.where(experts == expert, -float("inf"), choice)
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
        num_warps=1,
    )  # fmt: skip
    return chosen, weights
