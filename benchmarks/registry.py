"""The benchmarks by name, in the order in which they run. A new one is a module and a line here."""

from __future__ import annotations

BENCHMARKS = {
    "check": "benchmarks.check",
    "engines": "benchmarks.engines",
}
"""Name → module, imported when it is to run."""
