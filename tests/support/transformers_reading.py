"""Run by another release of transformers: what it makes of folders, as JSON on the last line of the output.

    python transformers_reading.py FOLDER...

Of each folder the config; where there are weights, too, the logits of transformers' own model of `ids.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM


def read(folder: Path) -> dict[str, Any]:
    """Return the pattern and the number of layers, and logits [B, S, V] as lists."""
    config = AutoConfig.from_pretrained(folder)
    found: dict[str, Any] = {
        "pattern": config.hybrid_override_pattern,
        "mtp_pattern": config.mtp_hybrid_override_pattern,
        "num_hidden_layers": config.num_hidden_layers,
    }
    if (folder / "ids.json").exists():
        model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()
        ids = torch.tensor(json.loads((folder / "ids.json").read_text(encoding="utf-8")))
        with torch.no_grad():  # 5.14 has no cache for a dense MLP
            found["logits"] = model(ids, use_cache=False).logits.tolist()
        found["class"] = f"{type(model).__module__}.{type(model).__name__}"
    return found


if __name__ == "__main__":
    print(json.dumps([read(Path(folder)) for folder in sys.argv[1:]]))
