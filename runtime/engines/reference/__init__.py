"""The reference evaluation: every op in plain PyTorch, and programs run op by op."""
