"""ONNX Runtime on a CPU: entry points in their float32 rendering."""
