"""Parameters that several functions of the API share."""

from __future__ import annotations

from typing import Literal

from n3c.runtime.options import Argument, Needs, Option

Target = Literal["torch", "onnx", "trt"]
"""The target that a spec is compiled to."""

FOR_PLANS = Needs("target", ("trt", None))
"""Without a target (`n3c check`) all of them are meant."""

SPEC = Argument("SPEC")
SET = Option("Override a spec value, as moe.top_k=8; may repeat.", metavar="KEY=VALUE")
SM = Option(
    "GPU architectures to build for: one plan for all of them.", metavar="SM[,SM]|native|portable", needs=FOR_PLANS
)
TRT = Option("Which TensorRT.", needs=FOR_PLANS)
CONTEXT = Option("Tokens in the cache of each sequence (default: serving.max_seq_len).", least=1)
BATCH = Option("Sequences.", least=1)
MEMORY = Option("Say what fits a GPU with so much memory instead of the known ones.", metavar="SIZE")
HTML = Option("Write a page of HTML too: one file, offline.", metavar="FILE")
FORCE = Option("Overwrite a file that is there.", needs=Needs("output"))
