"""Backends turn a program into files: torch, onnx, trt, safetensors; reference evaluates it."""
