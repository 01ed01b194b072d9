"""transformers' own `nemotron_h`. See `reading.py` for how this is run and what it writes. Nothing is replaced."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import transformers

from .reading import SCALES_OF_WEIGHTS, Reading, main, tensors_of


def read(folder: Path) -> Reading:
    """Return the parameters of transformers' model, experts one by one."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    held = model.state_dict()
    reading = Reading()
    for name in tensors_of(folder):
        place = re.sub(r"^backbone\.", "model.", name)
        expert = re.fullmatch(r"(.+\.experts)\.(\d+)\.(\w+)\.weight", place)
        place = f"{expert[1]}.{expert[3]}" if expert else place
        if place in held and not name.endswith(SCALES_OF_WEIGHTS):
            reading.values[name] = held[place][int(expert[2])] if expert else held[place]
    return reading


if __name__ == "__main__":
    main(transformers.__version__, read)
