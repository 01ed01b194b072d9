"""What a model costs: parameters, FLOPs, bytes, and which GPUs hold it."""
