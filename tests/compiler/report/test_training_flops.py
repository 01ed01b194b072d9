"""The FLOPs that train.py reports: those of the trunk and of every prediction depth."""

from __future__ import annotations

from n3c.compiler.report.cost import flops_per_token
from n3c.passes.lower.model import lower
from support.specs import small_spec


def test_each_depth_costs_its_blocks_and_the_head() -> None:
    """D 64, V 97; attention 4 x 16 and 2 x 16; experts 3 of 48 in a latent of 32; shared 80; 8 experts."""
    program = lower(small_spec())
    context = 100
    eh, head = 2 * 128 * 64, 2 * 64 * 97
    attention = 2 * 64 * (64 + 32 + 32 + 64) + 4 * context * 64
    moe = 2 * 64 * 8 + 2 * 2 * 64 * 32 + 3 * 2 * 2 * 32 * 48 + 2 * 2 * 64 * 80
    added = flops_per_token(program, context, mtp=True) - flops_per_token(program, context)
    assert added == 2 * (eh + attention + moe + head)
