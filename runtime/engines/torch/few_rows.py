"""Where products change their kernel: of the engine, and without torch for what predicts its times."""

FEW_ROWS = 16
"""Rows of x up to which a weight is decoded once and multiplied as it is read: those of a tile of tensor cores."""
