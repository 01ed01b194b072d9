"""Engines run entry points: one interface, implemented by the reference, ONNX Runtime and TensorRT."""
