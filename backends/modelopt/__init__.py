"""Layouts of quantized checkpoints that ModelOpt and its readers define."""
