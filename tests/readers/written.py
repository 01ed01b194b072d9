"""The checkpoints that n3c writes for the readers: three kinds of model in each format.

The sizes are the smallest that all readers can load: llama.cpp packs 64 weights of an input together. They are none
of the defaults that a reader takes for a key that it does not find.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from n3c.compiler.quantization.calibration.activation_scales import entries_of, save_scales
from n3c.compiler.quantization.calibration.calibrate import Amax
from n3c.compiler.quantization.units import find_linears
from n3c.specs.schema import Spec
from support.checkpoints import write_checkpoint
from support.command import n3c
from support.specs import spec_from_text

MODEL = """
schema = 1
name = "{kind}"
[model]
hidden_size = 64
vocab_size = 128
max_position_embeddings = 64
pattern = "{pattern}"
initializer_range = 0.1
[mamba]
num_heads = 8
head_dim = 16
state_size = 16
n_groups = 4
chunk_size = 8
[attention]
num_heads = 4
num_kv_heads = 2
head_dim = 16
"""
MLP = """
[mlp]
intermediate_size = 128
"""
MOE = """
[moe]
num_experts = 8
top_k = 3
intermediate_size = 64
shared_intermediate_size = 128
routed_scaling_factor = 2.5
"""
LATENT_AND_MTP = """latent_size = 64
[mtp]
pattern = "*E"
"""
KINDS = {
    "dense": MODEL.format(kind="dense", pattern="M-M*-") + MLP,
    "moe": MODEL.format(kind="moe", pattern="MEM*E") + MOE,
    "latent-moe-mtp": MODEL.format(kind="latent-moe-mtp", pattern="MEM*E") + MOE + LATENT_AND_MTP,
}
"""What the model is → its spec without formats."""

_ALL = """
[quantization]
format = "{format}"
block = [1, 16]
[[quantization.rules]]
roles = ["embedding", "moe.router", "mtp.moe.router", "mamba.conv1d"]
format = "bf16"
"""
_MIXED = """
[quantization]
format = "nvfp4"
block = [1, 16]
[[quantization.rules]]
roles = ["mamba.*_proj", "moe.shared.*"]
format = "fp8"
[[quantization.rules]]
roles = ["moe.latent_*", "lm_head"]
format = "w4a16_nvfp4"
[[quantization.rules]]
roles = ["attention.*", "moe.router", "embedding", "mamba.conv1d", "mtp.*"]
format = "bf16"
"""
_FP8_CACHE = """
[serving]
kv_cache_dtype = "fp8"
"""
FORMATS = {
    "bf16": _ALL.format(format="bf16"),
    "fp8": _ALL.format(format="fp8"),
    "nvfp4": _ALL.format(format="nvfp4"),
    "w4a16": _ALL.format(format="w4a16_nvfp4"),
    "mixed": _MIXED,
    "fp8-cache": _MIXED + _FP8_CACHE,
}
"""What the checkpoint is stored in → the tables of the spec that say so."""
CHAT_TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
"""Edge-LLM exports no model without one."""


@dataclass(frozen=True, slots=True)
class Written:
    """A checkpoint, and the diagnostics that n3c gave when it wrote it."""

    folder: Path
    diagnostics: list[dict[str, Any]]

    def notes(self) -> str:
        """Return what was told of readers."""
        return "\n".join(found["message"] for found in self.diagnostics if found["code"] == "W0628")


def write(kind: str, format_: str, folder: Path) -> Written:
    """Write a checkpoint of random weights, quantized with calibrated scales."""
    spec = spec_from_text(KINDS[kind] + FORMATS[format_])
    name = f"{kind}-{format_}"
    write_checkpoint(folder / "sources" / name, spec)
    save_scales(folder / "sources" / f"{name}.json", entries_of(_ranges(spec)))
    source, scales = folder / "sources" / name, folder / "sources" / f"{name}.json"
    (source / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    result = n3c("quantize", "--weights", source, "--activation-scales", scales, "-o", folder / name, "--json")
    assert result.code == 0, result.err
    return Written(folder / name, result.data["diagnostics"])


def _ranges(spec: Spec) -> Amax:
    """Return ranges of activations that all differ, but of what reads the same input."""
    linears = [linear.module for linear in find_linears(spec)]
    inputs = {module: 1.0 + i / 8 for i, module in enumerate(linears)}
    for half in ("k_proj", "v_proj"):
        inputs |= {module: inputs[module[:-6] + "q_proj"] for module in linears if module.endswith(half)}
    return Amax(
        inputs, {module: 3.0 + i / 4 for i, module in enumerate(linears) if module[-6:] in ("k_proj", "v_proj")}
    )
