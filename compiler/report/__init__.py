"""The costs of a model: parameters, FLOPs, bytes, and the GPUs that hold it."""
