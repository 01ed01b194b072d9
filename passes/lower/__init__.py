"""Lowering, the first of the passes: a spec becomes a program."""
