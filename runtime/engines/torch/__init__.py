"""Entry points by PyTorch: the generated package's modules over packed weights, on a CPU or an NVIDIA GPU."""
