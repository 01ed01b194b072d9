"""Gated delta nets as a block kind of n3c: what each module holds is one part of an extension.

`kind` the record; `lowering` and `ops` what a block computes; `reference` and `onnx` what its ops mean and how
engines spell them; `templates/` the PyTorch code; `merge_pieces` a pass; `mermaid` a backend. n3c imports each when it
needs it.
"""
