"""Prompts in, tokens out, over any engine."""
