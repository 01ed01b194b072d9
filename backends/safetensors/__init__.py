"""Checkpoints: streaming reading, source expressions, NVFP4 packing."""
