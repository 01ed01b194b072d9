"""Reading a checkpoint directory: safetensors only, by tensor or by band, never outside the directory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError, Span, counted
from n3c.ir.json_file import JsonError, read_json
from n3c.specs.spellings import LANGUAGE_MODEL, is_nested, is_text, released_name

from .header import HeaderError, TensorInfo, read_header
from .tensor_names import AmbiguousError, released_tensors

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
"""safetensors' names of the element types whose values are read; tensors of all others are carried as bytes."""


def file_error(code: str, message: str, path: Path, help: str | None = None) -> N3CError:
    """Return an error about a checkpoint file."""
    return N3CError(Diagnostic(code, message, Span(str(path)), help=help), ExitCode.FILE)


class Checkpoint:
    """The tensors of a directory, one file or shards with an index, by the names that released checkpoints have.

    Of a multimodal checkpoint they are those of the text model, until `add_others` is called.
    N3CError (exit code 6) for what is wrong.
    """

    others: dict[str, TensorInfo]
    """The tensors of the other models of a multimodal checkpoint, by the names in its files."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files: dict[str, Path] = {}
        self._infos: dict[str, TensorInfo] = {}
        headers = {path: _header(path) for path in self._paths()}
        multimodal = any(is_nested(name) for header in headers.values() for name in header)
        self.others, self._files_of_others = {}, dict[str, Path]()
        self._spellings: dict[str, str] = {}
        for path, header in headers.items():
            others = {name: info for name, info in header.items() if multimodal and not is_text(name)}
            self.others |= others
            self._files_of_others |= dict.fromkeys(others, path)
            text = {name: info for name, info in header.items() if name not in others}
            self._spellings |= {released_name(name): name for name in text}
            for name, info in _released(path, text):
                if name in self._files:
                    other = self._files[name]
                    message = f"tensor `{name}` is in {other.name} too" if other != path else f"`{name}` has two names"
                    raise file_error("E0609", message, path)
                self._files[name], self._infos[name] = path, info

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def repeat(self, name: str, other: str) -> None:
        """Give the tensor `name` a second name."""
        self._files[other], self._infos[other] = self.file(name), self._infos[name]

    def add_others(self) -> dict[str, str]:
        """Take in the other models' tensors; return each tensor's name in the files, or what that would be."""
        names = {name: self._spellings.get(name, LANGUAGE_MODEL[-1] + name) for name in self}
        for name, path in self._files_of_others.items():
            if name in self._files:
                raise file_error("E0609", f"`{name}` is a tensor of two models", path)
            self._files[name], self._infos[name] = path, self.others[name]
        return names | {name: name for name in self.others}

    def files(self) -> list[Path]:
        """Return the files that hold tensors, sorted."""
        return sorted(set(self._files.values()))

    def file(self, name: str) -> Path:
        """Return the file that holds a tensor."""
        if name not in self._files:
            raise file_error("E0603", f"no tensor `{name}` in the checkpoint", self.directory)
        return self._files[name]

    def info(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Return safetensors' name of the element type, and the shape; from the header alone."""
        self.file(name)
        return self._infos[name].dtype, self._infos[name].shape

    def bytes(self, name: str) -> int:
        """Return the size of a tensor in its file."""
        self.file(name)
        return self._infos[name].bytes

    def dtype(self, name: str) -> np.dtype[Any]:
        """Return numpy's element type of a tensor; N3CError where n3c does not read it."""
        dtype = DTYPES.get(self.info(name)[0])
        if dtype is None:
            message = f"tensor `{name}` has the element type {self.info(name)[0]}, which n3c does not read"
            raise file_error("E0605", message, self.file(name))
        return dtype

    def read(self, name: str) -> NDArray[np.generic]:
        """Return one tensor. BF16 and FP8 come as ml_dtypes' types."""
        return self.read_bytes(name, 0, self.bytes(name)).view(self.dtype(name)).reshape(self.info(name)[1])

    def read_rows(self, name: str, first: int, last: int) -> NDArray[np.generic]:
        """Return rows `first` to below `last` of a tensor [N, …]."""
        _, shape = self.info(name)
        row = self.bytes(name) // shape[0] if shape[0] else 0
        band = self.read_bytes(name, first * row, (last - first) * row)
        return band.view(self.dtype(name)).reshape(last - first, *shape[1:])

    def read_bytes(self, name: str, start: int, length: int) -> NDArray[np.uint8]:
        """Return bytes of a tensor. They are read, not mapped: memory is bounded by what is asked for."""
        path = self.file(name)
        data = np.empty(length, np.uint8)
        view, at = data.data, 0
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(self._infos[name].offset + start)
                while at < length:
                    got = file.readinto(view[at:])
                    if not got:
                        raise file_error("E0609", f"the file ends within tensor `{name}`", path)
                    at += got
        except OSError as error:
            message = f"reading tensor `{name}` failed: {error.strerror or error}"
            raise file_error("E0601", message, path) from error
        return data

    def _paths(self) -> list[Path]:
        if not self.directory.is_dir():
            raise file_error("E0601", "not a directory", self.directory)
        index = self.directory / INDEX
        if not index.is_file():
            if not (self.directory / SINGLE).is_file():
                raise _no_weights(self.directory)
            return [self.directory / SINGLE]
        try:
            shards = cast("Any", read_json(index))["weight_map"].values()
            names = sorted({str(shard) for shard in shards})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f": {error}" if isinstance(error, JsonError) else ""
            raise file_error("E0604", f"the index is not JSON with a `weight_map`{reason}", index) from error
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise file_error("E0604", f"the index names `{name}`, which is not a file of this directory", index)
        missing = [f"`{name}`" for name in names if not _is_file(self.directory / name)]
        if missing:
            one, many = "the index names {}, which is missing", f"of {len(names)} files in the index {{}} are missing"
            help_ = "download the checkpoint again: what is there is kept"
            raise N3CError([*counted("E0604", one, many, missing, Span(str(index)), help_)], ExitCode.FILE)
        return [self.directory / name for name in names]


_SHARD = re.compile(r".+-(\d{5})-of-(\d{5})\.safetensors")
_OTHER_FORMATS = {
    ".bin": "weights pickled by PyTorch, which may run any code and are not read",
    ".pt": "weights pickled by PyTorch, which may run any code and are not read",
    ".pth": "weights pickled by PyTorch, which may run any code and are not read",
    ".distcp": "a distributed checkpoint of PyTorch, which is not read",
    ".gguf": "weights of llama.cpp, which are not read",
}


def _no_weights(directory: Path) -> N3CError:
    """Return the error about a directory without weights that can be read: what it has instead."""
    names = sorted(path.name for path in directory.iterdir())
    shards = [found for name in names if (found := _SHARD.fullmatch(name)) is not None]
    if shards:
        message = f"{len(shards)} of {int(shards[0][2])} shards, as `{shards[0][0]}`, and no {INDEX}"
        return file_error("E0601", message, directory, "download the index: it says which tensor is in which shard")
    other = next((name for name in names if Path(name).suffix in _OTHER_FORMATS), None)
    if other is not None:
        message = f"`{other}`: {_OTHER_FORMATS[Path(other).suffix]}"
        help_ = "download the safetensors files, or write them: `save_pretrained` of transformers does"
        return file_error("E0601", message, directory, help_)
    loose = next((name for name in names if name.endswith(".safetensors")), None)
    also = "" if loose is None else f"; `{loose}` has another name"
    return file_error("E0601", f"neither {SINGLE} nor {INDEX} in this directory{also}", directory)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or with a null byte
        return False


def _released(path: Path, header: dict[str, TensorInfo]) -> list[tuple[str, TensorInfo]]:
    """Return the tensors of a file by their released names."""
    try:
        return list(released_tensors(header))
    except AmbiguousError as error:
        help_ = "store each expert as a tensor, as released checkpoints do: `….experts.0.up_proj.weight`"
        raise file_error("E0620", str(error), path, help_) from error


def _header(path: Path) -> dict[str, TensorInfo]:
    try:
        return read_header(path)
    except (OSError, HeaderError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise file_error("E0609", f"not a readable safetensors file: {reason}", path) from error
