"""What the command line asks of sensitive layers and activations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Request:
    """What the command line asks for; nothing of it by default."""

    like: Path | None = None
    effective_bits: float | None = None
    """The budget of --auto; None: formats are not chosen."""
    mtp: bool = False
    calibration: Path | None = None
    samples: int = 128
    length: int = 512
    activation_scales: Path | None = None
    save_activation_scales: Path | None = None
    write_spec: Path | None = None
