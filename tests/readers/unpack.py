"""Unpack what the readers need of their archives, and delete these: `python unpack.py ENVIRONMENT`.

Of the wheels of vLLM, SGLang and TensorRT Edge-LLM the Python and JSON files; of llama-cpp-python's source archive
llama.cpp's converter and its package gguf.
"""

from __future__ import annotations

import sys
import tarfile
import zipfile
from pathlib import Path

LLAMA_CPP = ("conversion/", "gguf-py/", "convert_hf_to_gguf.py")


def unpack(environment: Path) -> None:
    """Unpack every archive of `environment/archives` into a folder of its name beside that."""
    for path in sorted((environment / "archives").iterdir()):
        folder = environment / path.name.partition("-")[0]
        if path.suffix == ".whl":
            with zipfile.ZipFile(path) as wheel:
                wheel.extractall(folder, [name for name in wheel.namelist() if name.endswith((".py", ".json"))])
        else:
            with tarfile.open(path) as archive:
                for member in archive:
                    member.name = member.name.partition("/vendor/llama.cpp/")[2]
                    if member.isfile() and member.name.startswith(LLAMA_CPP):
                        archive.extract(member, folder, filter="data")
        path.unlink()


if __name__ == "__main__":
    unpack(Path(sys.argv[1]))
