"""`n3c verify`: every form of a model computes the same, layer by layer."""
