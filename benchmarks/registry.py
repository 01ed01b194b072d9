"""The benchmarks by name, in the order in which they run. A new one is a module and a line here."""

from __future__ import annotations

BENCHMARKS = {
    "check": "benchmarks.check",
    "engines": "benchmarks.engines",
    "building": "benchmarks.building",
    "torch": "benchmarks.torch_model",
    "sampling": "benchmarks.sampling",
    "load": "benchmarks.load",
    "rounds": "benchmarks.rounds",
    "simulation": "benchmarks.simulation",
    "capacity": "benchmarks.capacity",
    "quantize": "benchmarks.quantize",
    "auto_quantize": "benchmarks.auto_quantize",
    "distillation": "benchmarks.distillation",
    "agreement": "benchmarks.agreement",
}
"""Name → module, imported when it is to run."""
