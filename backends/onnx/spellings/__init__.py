"""How ONNX spells each IR op: one function an op."""
