"""Peaks of GPUs, by which train.py reports MFU."""

from __future__ import annotations

PEAK_TFLOPS = (
    ("A100", 312.0),
    ("A30", 165.0),
    ("A10", 125.0),
    ("L4", 121.0),
    ("L40", 181.0),
    ("L40S", 362.0),
    ("RTX 4090", 165.2),
    ("RTX 5090", 209.5),
    ("RTX 6000 Ada", 364.0),
    ("RTX PRO 6000", 503.8),
    ("H100", 989.0),
    ("H100 NVL", 835.0),
    ("H100 PCIe", 756.0),
    ("H200", 989.0),
    ("GH200", 989.0),
    ("B200", 2250.0),
    ("GB200", 2500.0),
    ("B300", 2250.0),
    ("GB300", 2500.0),
    ("GB10", 125.0),
)
"""(words of the device's name, dense BF16 TFLOP/s with float32 sums as NVIDIA states them); the most words decide."""
