"""`n3c verify`: every implementation of a model computes the same, layer by layer."""
