"""The benchmarks by name, in the order in which they run. A new one is a module and a line here."""

from __future__ import annotations

BENCHMARKS = {
    "check": "benchmarks.check",
    "engines": "benchmarks.engines",
    "building": "benchmarks.building",
    "torch": "benchmarks.torch_model",
    "sampling": "benchmarks.sampling",
    "simulation": "benchmarks.simulation",
    "quantize": "benchmarks.quantize",
    "auto_quantize": "benchmarks.auto_quantize",
    "distillation": "benchmarks.distillation",
}
"""Name → module, imported when it is to run."""
