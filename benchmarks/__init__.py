"""Benchmarks: each prints Markdown tables whose ratios are against a peer that is measured in the same run.

One module each, with `TITLE` and `run(quick) -> Iterator[str]`; `registry.py` names them.
"""
