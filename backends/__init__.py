"""Backends emit and read files: PyTorch code, ONNX graphs, TensorRT plans, checkpoints."""
