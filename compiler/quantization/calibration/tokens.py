"""Calibration tokens from a file: NumPy arrays, raw unsigned integers, or text where the vocabulary is bytes."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError, Span

if TYPE_CHECKING:
    from torch import Tensor

BYTES = 256
"""A vocabulary of this size is bytes; that of any other is its tokenizer's, which n3c does not have."""


def read_tokens(path: Path, vocab_size: int, *, samples: int, length: int, least: int = 2) -> Tensor:
    """Return at most `samples` sequences of `length` tokens, int64 [N, L], spread evenly over the file.

    - `.npy`: integers [T], cut into sequences, or [N, T], each row cut to `length`.
    - `.bin`: raw unsigned integers, little-endian, of 2 bytes where the vocabulary fits, else of 4.
    - anything else: UTF-8 text, for a vocabulary of 256 bytes.

    Raises N3CError (exit code 6) where the file cannot be read, is empty, has rows of fewer than `least` tokens, or
    holds ids beyond the vocabulary; (exit code 2) for text that needs a tokenizer.
    """
    import torch

    ids = _read(path, vocab_size)
    if ids.size < 2:
        raise _fault("E0630", f"{ids.size} tokens: calibration needs at least 2", path)
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        at = int(np.argmax((ids < 0) | (ids >= vocab_size)))
        message = f"token {at} is {int(ids.reshape(-1)[at])}: the vocabulary has ids 0 to {vocab_size - 1}"
        raise _fault("E0631", message, path)
    rows = ids if ids.ndim == 2 else _cut(ids, length)
    rows = rows[:, :length]
    if rows.shape[1] < least:
        message = f"rows of {rows.shape[1]} tokens: calibration needs at least {least}"
        help_ = "give a longer text, or a larger --calibration-length"
        raise N3CError(Diagnostic("E0630", message, Span(str(path)), help=help_), ExitCode.FILE)
    picked = np.unique(np.linspace(0, len(rows) - 1, min(samples, len(rows))).round().astype(np.int64))
    return torch.from_numpy(rows[picked].astype(np.int64))


def _read(path: Path, vocab_size: int) -> NDArray[Any]:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a device or a pipe may never end
            raise _fault("E0601", "cannot read the calibration file: it is not a regular file", path)
        if path.suffix == ".npy":
            return _array(path)
        if path.suffix == ".bin":
            return _raw(path, np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4"))
        with path.open("rb"):  # whose error says why
            pass
        if vocab_size != BYTES:
            message = f"text needs the tokenizer of this vocabulary of {vocab_size}, which n3c does not have"
            help_ = "give token ids: .npy, or .bin of unsigned integers"
            raise N3CError(Diagnostic("E0703", message, Span(str(path)), help=help_), ExitCode.USAGE)
        return _raw(path, np.dtype(np.uint8))
    except OSError as error:
        raise _fault("E0601", f"cannot read the calibration file: {error.strerror or error}", path) from None


def _array(path: Path) -> NDArray[Any]:
    if path.stat().st_size == 0:
        raise _fault("E0630", "the file is empty", path)
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise _fault("E0630", f"not a NumPy array: {error}", path) from None
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
        message = f"{array.ndim}-dimensional {array.dtype}: token ids are integers [T] or [N, T]"
        raise _fault("E0630", message, path)
    return array


def _raw(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    size = path.stat().st_size
    if size == 0 or size % dtype.itemsize:
        message = f"{size} bytes: token ids of this vocabulary take {dtype.itemsize} bytes each"
        raise _fault("E0630", message, path)
    return np.memmap(path, dtype=dtype, mode="r")


def _cut(ids: NDArray[Any], length: int) -> NDArray[Any]:
    """Cut [T] into rows of `length`; what is left over is dropped, a file shorter than one row is one."""
    length = min(length, len(ids))
    count = len(ids) // length
    return ids[: count * length].reshape(count, length)


def _fault(code: str, message: str, path: Path) -> N3CError:
    return N3CError(Diagnostic(code, message, Span(str(path))), ExitCode.FILE)
