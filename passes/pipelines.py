"""The passes by name, and in which order they run.

`SERVING` is the pipeline of every deployed entry point:
  quantize    first: formats decide what may merge and how experts are packed
  fuse_moe    before plan_state, while every function still is a plain function of its input
  plan_state  gives functions their states
  cleanup     last: merged weights leave their parts behind, and decode drops multi-token prediction
Training runs none: generated code carries its own numerics.
"""

from __future__ import annotations

SERVING = ("quantize", "fuse_moe", "plan_state", "cleanup")

PASSES = {
    "quantize": "n3c.passes.quantize:Quantize",
    "fuse_moe": "n3c.passes.fuse_moe:FuseMoe",
    "plan_state": "n3c.passes.plan_state:PlanState",
    "cleanup": "n3c.passes.cleanup:Cleanup",
}
"""Name → module and class, imported when asked for."""
