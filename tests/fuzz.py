"""Coverage-guided fuzzing of one reader, with atheris: `python -m fuzz READER SECONDS [SEED]` in tests/.

It begins with the corpus of the reader. What it finds stops it, and is written to tests/corpus/READER/found-…, to be
kept under a telling name once the fault is mended; new inputs that reach other code stay in a temporary folder.
"""

from __future__ import annotations

import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

atheris: Any = import_module("atheris")  # of the extra `fuzz`, for Linux
with atheris.instrument_imports(include=["n3c", "tomllib", "json"]):
    from support.file_readers import CORPUS, READERS, read


def main(name: str, seconds: str, seed: str = "1") -> None:
    """Fuzz the reader `name`."""
    if name not in READERS:
        sys.exit(f"{name}: none of {', '.join(READERS)}")
    with tempfile.TemporaryDirectory(prefix="n3c-fuzz-") as folder, tempfile.TemporaryDirectory() as grown:

        def once(data: bytes) -> None:
            read(name, Path(folder), data)

        limits = (f"-max_total_time={seconds}", f"-seed={seed}", "-max_len=65536", "-timeout=60")
        found = f"-artifact_prefix={CORPUS / name / 'found-'}"
        atheris.Setup([sys.argv[0], *limits, found, grown, str(CORPUS / name)], once)
        atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
