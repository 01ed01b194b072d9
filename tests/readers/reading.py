"""What the scripts share that run inside a reader: they are started as `python X_reading.py OUT CHECKPOINT...`.

For each checkpoint OUT gets a folder of its name with `reading.json` and, unless the reader refused the checkpoint,
`values.safetensors`: what the reader holds for each tensor of the checkpoint, under the checkpoint's own name, in
float32. Weights are dequantized, so `weight_scale` and `weight_scale_2` have no entries of their own. NaN stands for
what the reader has a place for and did not fill.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
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


def main(version: str, read: Callable[[Path], Reading]) -> None:
    """Write what `read` makes of the checkpoints that the command line names."""
    out, *folders = (Path(argument) for argument in sys.argv[1:])
    for folder in folders:
        (out / folder.name).mkdir(parents=True)
        found: dict[str, object] = {"version": version}
        try:
            reading = read(folder)
        except (Exception, SystemExit) as error:  # what a reader refuses is a result
            traceback.print_exc()
            found["refused"] = f"{type(error).__name__}: {error}"
        else:
            values = {name: value.detach().float().contiguous() for name, value in reading.values.items()}
            save_file({name: value.clone() for name, value in values.items()}, out / folder.name / "values.safetensors")
            found |= {"formats": reading.formats, "kv_cache": reading.kv_cache, "unusable": reading.unusable}
        (out / folder.name / "reading.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
