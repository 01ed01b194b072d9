"""The readers, and the environment that `make test-readers` makes for them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENVIRONMENT = ROOT / ".venv-oracles-readers"


@dataclass(frozen=True, slots=True)
class Reader:
    """A reader of checkpoints: the module of this folder that runs it, and where its code lies."""

    title: str
    module: str
    paths: tuple[str, ...]
    tolerance: float
    """Largest difference of a value, relative to it: what the reader's own type of weights and scales costs."""


READERS = (
    Reader("vLLM", "vllm_reading", ("vllm",), 2**-8),
    Reader("SGLang", "sglang_reading", ("sglang",), 2**-8),
    Reader("TensorRT Edge-LLM", "edge_llm_reading", ("tensorrt_edgellm",), 2**-11),
    Reader("TensorRT Edge-LLM to ONNX", "edge_llm_exporting", ("tensorrt_edgellm",), 2**-11),
    Reader("llama.cpp", "llama_cpp_reading", ("llama_cpp_python", "llama_cpp_python/gguf-py"), 1e-6),
    Reader("compressed-tensors", "compressed_tensors_reading", (), 2**-7),
    Reader("transformers", "transformers_reading", (), 0),
)


def run(reader: Reader, checkpoints: Sequence[Path], out: Path) -> None:
    """Let `reader` read `checkpoints`; what it makes of each is in a folder of its name in `out` (see reading.py)."""
    python = ENVIRONMENT / "bin" / "python"
    assert python.exists(), f"{ENVIRONMENT} is not there: `make test-readers` makes it"
    path = os.pathsep.join([str(ROOT / "tests"), *(str(ENVIRONMENT / name) for name in reader.paths)])
    done = subprocess.run(
        [python, "-m", f"readers.{reader.module}", str(out), *map(str, checkpoints)],
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
