"""Reading a checkpoint directory: safetensors only, by tensor, memory-mapped, never outside the directory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError, Span

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
}
"""safetensors' names of the element types that are read."""


def file_error(code: str, message: str, path: Path, help: str | None = None) -> N3CError:
    """Return an error about a checkpoint file."""
    return N3CError(Diagnostic(code, message, Span(str(path)), help=help), ExitCode.FILE)


class Checkpoint:
    """The tensors of a directory, one file or shards with an index. N3CError (exit code 6) for what is wrong."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._handles: dict[Path, Any] = {}
        self._files = {name: path for path in self._paths() for name in self._open(path).keys()}  # noqa: SIM118

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def files(self) -> list[Path]:
        """Return the files that hold tensors, sorted."""
        return sorted(set(self._files.values()))

    def info(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Return safetensors' name of the element type, and the shape; from the header alone."""
        piece = self._open(self._file(name)).get_slice(name)
        return str(piece.get_dtype()), tuple(int(d) for d in piece.get_shape())

    def read(self, name: str) -> NDArray[np.generic]:
        """Return one tensor. BF16 and FP8 come as ml_dtypes' types."""
        path = self._file(name)
        dtype = DTYPES.get(self.info(name)[0])
        if dtype is None:
            raise file_error(
                "E0605", f"tensor `{name}` has the element type {self.info(name)[0]}, which n3c does not read", path
            )
        import torch  # numpy has no name for FP8: torch carries the bytes

        tensor: Any = self._open(path).get_tensor(name)
        raw: NDArray[np.uint8] = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        return raw.view(dtype).reshape(tuple(tensor.shape))

    def _file(self, name: str) -> Path:
        if name not in self._files:
            raise file_error("E0603", f"no tensor `{name}` in the checkpoint", self.directory)
        return self._files[name]

    def _open(self, path: Path) -> Any:
        if path not in self._handles:
            import safetensors

            try:
                self._handles[path] = safetensors.safe_open(str(path), framework="pt")
            except (OSError, safetensors.SafetensorError) as error:
                raise file_error("E0609", f"not a readable safetensors file: {error}", path) from error
        return self._handles[path]

    def _paths(self) -> list[Path]:
        if not self.directory.is_dir():
            raise file_error("E0601", "not a directory", self.directory)
        index = self.directory / INDEX
        if not index.is_file():
            if not (self.directory / SINGLE).is_file():
                raise file_error("E0601", f"neither {SINGLE} nor {INDEX} in this directory", self.directory)
            return [self.directory / SINGLE]
        try:
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            names = sorted({str(shard) for shard in shards})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise file_error("E0604", "the index is not JSON with a `weight_map`", index) from error
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise file_error("E0604", f"the index names `{name}`, which is not a file of this directory", index)
            if not (self.directory / name).is_file():
                raise file_error("E0604", f"the index names `{name}`, which is missing", index)
        return [self.directory / name for name in names]
