"""fuse_moe: pick the dispatch of experts for serving, and merge linears that read the same input.

Two rewrites, each with its pattern in its module:
1. `expert_dispatch`: only the chosen experts are computed, but in the entry points of `batched` all at once;
2. `merged_linears`: BF16 linears of one input (router and latent_down; q, k and v) become one.

After quantize, as formats decide what may merge; after plan_state, which makes the entry points;
before cleanup, which drops the parts of what merges.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from n3c.ir.program import Program

from .rewrites.expert_dispatch import dispatch_experts
from .rewrites.merged_linears import merge_linears


@dataclass(frozen=True, slots=True)
class FuseMoe:
    """Dispatch of experts, merged linears."""

    name: ClassVar[str] = "fuse_moe"

    merge_linears: bool = True
    """Whether the second rewrite is applied."""
    batched: tuple[str, ...] = ("prefill",)
    """Entry points whose experts are computed all at once."""

    def run(self, program: Program) -> bool:
        """Rewrite functions and, with them, the parameters that their calls bind."""
        changed = dispatch_experts(program, self.batched, self.name)
        return (self.merge_linears and merge_linears(program, self.name)) or changed
