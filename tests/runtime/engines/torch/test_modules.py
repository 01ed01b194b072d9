"""What is computed beside: begun with the MoE, asked for at its end."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from n3c.runtime.engines.torch.kernel_operations import KernelOperations
from n3c.runtime.engines.torch.modules import Beside
from n3c.runtime.engines.torch.operations import Operations


class Moe(nn.Module):
    """Routed and shared experts, which note that they run."""

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.events = events
        self.shared_experts: nn.Module = nn.Identity()

    def forward(self, x: Tensor, batch: object) -> Tensor:
        self.events.append("routed")
        y: Tensor = self.shared_experts(x)
        return x + y


def test_begins_with_the_moe_and_ends_where_it_is_asked_for() -> None:
    events = list[str]()

    def beside(work: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
        events.append("begun")
        y = work(x)

        def result() -> Tensor:
            events.append("asked for")
            return y

        return result

    moe = Moe(events)
    moe.shared_experts = Beside(moe, nn.Linear(3, 3), cast("Operations", SimpleNamespace(beside=beside)))
    for _ in range(2):
        events.clear()
        x = torch.randn(2, 3)
        assert torch.equal(moe(x, None), x + moe.shared_experts.module(x))
        assert events == ["begun", "routed", "asked for"]


def test_without_a_gpu_it_is_computed_when_it_is_asked_for() -> None:
    operations: Any = object.__new__(KernelOperations)
    seen = list[int]()

    def work(x: Tensor) -> Tensor:
        seen.append(len(x))
        return x + 1

    result = operations.beside(work, torch.zeros(2, 3))
    assert not seen
    assert torch.equal(result(), torch.ones(2, 3)) and seen == [2]
