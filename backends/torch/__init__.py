"""Generated PyTorch: one readable, standalone model.py."""
