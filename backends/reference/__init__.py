"""Reference evaluation of every op in PyTorch."""
