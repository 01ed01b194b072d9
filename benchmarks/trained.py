"""A small model that has learnt from Python's library, by the train.py that n3c writes; benchmarks start from it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from n3c.backends.torch.emit import emit
from n3c.backends.torch.loading import write_files
from n3c.specs.schema import Spec


def prepare(spec: Spec, folder: Path) -> Path:
    """Write the training code of `spec` and the text into `folder`, where they are not yet; return the text's path."""
    text = folder / "text"
    if not text.exists():
        sources = sorted(Path(os.__file__).parent.glob("*.py"))
        text.write_bytes(b"".join(source.read_bytes() for source in sources))
        write_files(emit(spec, "0" * 64), folder)
    return text


def train(folder: Path, out: Path, *options: str) -> None:
    """Run the train.py of a prepared folder; the checkpoint is in `out`/export."""
    command = [sys.executable, str(folder / "train.py"), "--data", str(folder / "text"), "--out", str(out), *options]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
