"""Passes rewrite programs, one pass a file; `pipelines.py` has their order."""
