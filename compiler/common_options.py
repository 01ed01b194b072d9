"""Parameters that several functions of the API share."""

from __future__ import annotations

from typing import Literal

from n3c.runtime.options import Argument, Needs, Option

Target = Literal["torch", "onnx", "trt"]
"""What a spec is compiled to."""

SPEC = Argument("SPEC")
SET = Option("Override a spec value, as moe.top_k=8; may repeat.", metavar="KEY=VALUE")
CONTEXT_HELP = "Tokens in the cache of each sequence (default: serving.max_seq_len)."
BATCH_HELP = "Sequences."
FORCE = Option("Overwrite a file that is there.", needs=Needs("output"))


def sm_option(needs: Needs) -> Option:
    """Return the option of the GPUs that plans are for."""
    return Option("GPU architectures to build for: one plan for all of them.", metavar="SM[,SM]|portable", needs=needs)


def trt_option(needs: Needs) -> Option:
    """Return the option of which TensorRT builds plans."""
    return Option("Which TensorRT.", needs=needs)
