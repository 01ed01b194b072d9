"""Rewrites of functions that passes are composed of."""
