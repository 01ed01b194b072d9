"""One interface, and what implements it: the reference evaluation, ONNX Runtime, TensorRT."""
