"""Magnitudes of activations: the model run over tokens, a part of its weights at a time."""
