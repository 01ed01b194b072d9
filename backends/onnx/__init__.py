"""ONNX: one graph an entry point, weights bound as inputs."""
