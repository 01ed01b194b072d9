"""What the scripts share that run inside a reader: they are started as `python X_reading.py OUT CHECKPOINT...`.

For each checkpoint OUT gets a folder of its name with `reading.json` and, unless the reader refused the checkpoint,
`values.safetensors`: what the reader holds for each tensor of the checkpoint, under the checkpoint's own name, in
float32. Weights are dequantized, so `weight_scale` and `weight_scale_2` have no entries of their own. NaN stands for
what the reader has a place for and did not fill.
"""

from __future__ import annotations

import json
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
SCALES_OF_WEIGHTS = (".weight_scale", ".weight_scale_2")


@dataclass
class Reading:
    """What a reader made of a checkpoint: values by tensor, ModelOpt's algorithm by linear, and the cache's type."""

    values: dict[str, Tensor] = field(default_factory=dict)
    formats: dict[str, str] = field(default_factory=dict)
    kv_cache: str | None = None
    unusable: dict[str, str] = field(default_factory=dict)
    """What is loaded and cannot be used → the reader's message."""


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Return every tensor of a checkpoint as it is stored."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def dequantized(codes: Tensor, scale: Tensor, scale_2: Tensor) -> Tensor:
    """Return a packed NVFP4 weight [N, K/2] in float32 [N, K]."""
    packed = codes.view(torch.uint8)
    elements = E2M1[torch.stack([packed & 15, packed >> 4], dim=-1).long()].reshape(*scale.shape, 16)
    return (elements * (scale.float() * scale_2.float())[..., None]).flatten(-2)


class MergedParameters:
    """The parameters of vLLM and SGLang, which merge q, k and v, and a layer's experts, by names of the checkpoint."""

    def __init__(self, parameters: Mapping[str, Tensor], widths: Mapping[str, int], experts: str) -> None:
        """`widths`: rows of q, k and v; `experts`: what the merged weights of `….experts` are named below it."""
        self.parameters = parameters
        self.widths = widths
        self.experts = experts

    def value(self, name: str, rows: int) -> Tensor | None:
        """Return what is held for a tensor, float32; `rows` of it, the rest is padding. None: there is no place."""
        module, _, kind = name.rpartition(".")
        if kind == "A_log":
            a = self._held(f"{module}.A", rows)
            return None if a is None else (-a).log()
        if kind in ("k_scale", "v_scale"):
            return self._held(f"{module.rpartition('.')[0]}.attn.{kind}", rows)
        held = self._held(name, rows)
        if held is None or kind != "weight":
            return held
        scale = self._held(f"{name}_scale", rows)
        scale_2 = self._held(f"{name}_scale_2", rows)
        if scale is None:
            return held.float()
        return held.float() * scale if scale_2 is None else dequantized(held, scale, scale_2)

    def _held(self, name: str, rows: int) -> Tensor | None:
        """Return a tensor's own part of the parameter that it is merged into."""
        module, _, kind = name.rpartition(".")
        parent, _, last = module.rpartition(".")
        expert = re.fullmatch(r"(.+\.experts)\.(\d+)", parent)
        if expert:
            half = "w13" if last == "up_proj" else "w2"
            merged = self.parameters.get(f"{expert[1]}.{self.experts}{half}_{kind}")
            found = None if merged is None else merged[int(expert[2])]
        else:
            fused = f"{parent}.qkv_proj.{kind}" if last in self.widths else name
            found = self.parameters.get(fused)
            if found is None or found.dim() == 0:
                return found
            if found.dim() == 1 and kind.endswith(("_scale", "_scale_2")):
                return found.max()  # one for each merged matrix, of which readers keep the largest
            if last in self.widths:
                found = found.split(list(self.widths.values()))[list(self.widths).index(last)]
            found = found[:rows]
        return found


def main(version: str, read: Callable[[Path], Reading]) -> None:
    """Write what `read` makes of the checkpoints that the command line names."""
    out, *folders = (Path(argument) for argument in sys.argv[1:])
    for folder in folders:
        (out / folder.name).mkdir(parents=True)
        found: dict[str, object] = {"version": version}
        try:
            reading = read(folder)
        except Exception as error:  # what a reader refuses is a result
            traceback.print_exc()
            found["refused"] = f"{type(error).__name__}: {error}"
        else:
            values = {name: value.detach().float().contiguous() for name, value in reading.values.items()}
            save_file({name: value.clone() for name, value in values.items()}, out / folder.name / "values.safetensors")
            found |= {"formats": reading.formats, "kv_cache": reading.kv_cache, "unusable": reading.unusable}
        (out / folder.name / "reading.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
