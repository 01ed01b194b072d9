"""Entry points on a CPU, by ONNX Runtime."""
