"""Calibration tokens: read by the generated package of the spec, with what its train.py reads --data with."""

from __future__ import annotations

import itertools
from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError, Span
from n3c.specs.schema import Spec

from ..request import CalibrationData
from .streamed_model import StreamedModel

if TYPE_CHECKING:
    from torch import Tensor

PARTS = ("training.data", "training.chat")
"""Of a generated package: they read data, and import what else does."""


class Sequences(NamedTuple):
    """Tokens to calibrate with."""

    ids: Tensor
    """[N, L] int64."""
    opened: list[str]
    """What was read, a line a source."""


def read_tokens(spec: Spec, data: CalibrationData, *, least: int = 2) -> Sequences:
    """Return sequences of `data`, spread evenly over files of tokens and bytes; of documents the first ones.

    Raises N3CError: exit code 6 where a file cannot be read, holds no data of this model, or fewer than `least`
    tokens; 2 for options that do not fit the data, or a package that these need.
    """
    training = StreamedModel.generate(spec, PARTS).training
    try:
        return _read(training, spec.model.vocab_size, data, least)
    except training.settings.TrainError as error:
        code = "E0703" if error.code == ExitCode.USAGE else "E0630"
        raise N3CError(Diagnostic(code, str(error), Span(str(data.path))), ExitCode(error.code)) from None
    except OSError as error:
        message = f"cannot read the calibration data: {error.strerror or error}"
        diagnostic = Diagnostic("E0601", message, Span(str(error.filename or data.path)))
        raise N3CError(diagnostic, ExitCode.FILE) from None


def _read(training: Any, vocab_size: int, data: CalibrationData, least: int) -> Sequences:
    import torch

    sources, weights = training.data.sources_of(_settings(training, data))
    streams = [_stream(training, vocab_size, source, data) for source in sources]
    length = min(data.calibration_length, *(stream.count for stream in streams))
    if length < least:
        help_ = "give a longer text, or a larger --calibration-length"
        message = f"sequences of {length} tokens: calibration needs at least {least}"
        raise N3CError(Diagnostic("E0630", message, Span(str(data.path)), help=help_), ExitCode.FILE)
    rows: list[Tensor] = []
    taken, block = 0, training.data.BLOCK
    for stream, until in zip(streams, itertools.accumulate(training.data.counts_of(weights)), strict=True):
        windows = training.data.Windows(stream, 0, stream.count, length)
        share = data.calibration_samples * until // block - taken
        taken += share
        picked = np.linspace(0, windows.per_epoch - 1, min(share, windows.per_epoch)).round()
        rows += [windows.read(int(number)).ids for number in picked]
    return Sequences(torch.stack(rows), [stream.opened for stream in streams])


def _settings(training: Any, data: CalibrationData) -> Any:
    """Return the settings of a train.py that would read `data`."""
    # What train.py needs beside, and none of which matters to a reader.
    others = {"out": "", "steps": 1, "seq_len": 2, "warmup": 0.0, "decay": 0.0, "numerics": "float32"}
    read = {name: getattr(data, name) for name in ("data_format", "text_field", "messages_field", "dtype")}
    tokenizer = "" if data.tokenizer is None else str(data.tokenizer)
    return training.settings.checked({"data": str(data.path), "tokenizer": tokenizer, **read, **others})


def _stream(training: Any, vocab_size: int, source: Any, data: CalibrationData) -> Any:
    """Return the `Tokens` of a source: all of them where they are mapped, else those of the first documents."""
    import torch

    sources, path = training.sources, Path(source.data)
    found = training.file_kinds.find(path, source)
    if found.kind in ("tokens", "bytes"):
        return sources.open_tokens(path, source)
    for file in found.files:
        sources.require_no_hole(file)
    documents = sources.documents_in(found, source)
    ids, most = array("q"), data.calibration_samples * data.calibration_length
    with training.token_cache.bounded_memory():
        for encoded in documents.encode():
            ids.extend(encoded.ids)
            if len(ids) >= most:
                break
    tokens = torch.frombuffer(ids, dtype=torch.int64) if ids else torch.empty(0, dtype=torch.int64)
    opened = sources.described(found, len(ids), f"of the first documents, by {documents.name}")
    return training.tokens.Tokens(path, vocab_size, [tokens], opened=opened)
