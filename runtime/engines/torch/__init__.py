"""The engine that runs a model in PyTorch, on a CPU or a CUDA device, with quantized weights as they are stored."""
