"""Copies of a program in other types, for one engine of several."""
