"""Generated PyTorch: a readable, standalone package, and the programs that train it."""
