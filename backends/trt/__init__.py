"""TensorRT: plans from the ONNX files, and what the builder says about them."""
