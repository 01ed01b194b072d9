"""torchtitan's own main on a CPU, which torchtitan 0.3.0 has no option for: what it asks of a GPU is answered here.

Started as a script, with torchtitan's arguments, by torchrun.
"""

from __future__ import annotations

import importlib
import runpy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch


def answering(answer: object) -> Callable[..., object]:
    return lambda *_: answer


if __name__ == "__main__":
    found: Any = importlib.import_module("torch._utils")
    found._get_available_device_type = lambda: "cpu"
    answers: dict[str, object] = {
        "current_device": 0,
        "empty_cache": None,
        "get_device_name": "cpu",
        "get_device_properties": SimpleNamespace(name="cpu", total_memory=1),
        "memory_stats": {},
        "reset_peak_memory_stats": None,
        "set_device": None,
    }
    for name, answer in answers.items():
        setattr(torch.cpu, name, answering(answer))
    tools: Any = importlib.import_module("torchtitan.tools.utils")
    tools.get_local_device = lambda: torch.device("cpu")
    runpy.run_module("torchtitan.train", run_name="__main__")
