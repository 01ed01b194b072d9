"""Plans on a GPU, by TensorRT."""
