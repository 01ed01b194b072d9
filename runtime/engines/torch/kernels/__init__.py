"""Triton kernels of decoding and prefill: one file a kernel, plain tensors in and out, the host is never waited for.

Each can be captured in a CUDA graph: grids follow from shapes alone, and programs without work return at once. Block
sizes are chosen for Hopper (132 SMs, 3.35 TB/s, about 26 NVFP4 weights an SM and clock at full bandwidth) by plain
Python in the launch functions; nothing is tuned at run time. Nothing is summed by atomics, so results repeat to
the bit. The same code runs on a CPU in Triton's interpreter (TRITON_INTERPRET=1), where products are float32.
"""
