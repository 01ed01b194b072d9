"""Weights that a trainer pushes into a running engine: received in chunks, checked, and taken all at once."""
