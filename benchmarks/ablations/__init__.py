"""Ablations of the literature at the size of a CPU: `make ablations`, or `python -m benchmarks.ablations`."""
