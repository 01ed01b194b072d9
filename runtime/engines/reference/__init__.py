"""The meaning of every op in plain PyTorch, and a program evaluated by it."""
