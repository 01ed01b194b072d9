"""Serving on paper: an engine that computes nothing and moves a clock, under the batch and cache of serving."""
