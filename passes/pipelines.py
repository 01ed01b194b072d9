"""The passes by name, and in which order they run.

`SERVING` is the pipeline of every deployed entry point:
  quantize    first: formats decide what may merge and how experts are packed
  plan_state  makes the entry points, and gives functions their states
  fuse_moe    after plan_state: the dispatch of experts depends on the entry point
  cleanup     last: merged weights leave their parts behind, and prefill needs only the caches of multi-token prediction
Training runs none: generated code carries its own numerics.
"""

from __future__ import annotations

SERVING = ("quantize", "plan_state", "fuse_moe", "cleanup")

PASSES = {
    "quantize": "n3c.passes.quantize:Quantize",
    "fuse_moe": "n3c.passes.fuse_moe:FuseMoe",
    "plan_state": "n3c.passes.plan_state:PlanState",
    "cleanup": "n3c.passes.cleanup:Cleanup",
}
"""Name → module and class, imported when asked for."""
