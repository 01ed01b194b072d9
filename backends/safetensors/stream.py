"""Making shards: bands of weights are read and packed by all cores, and written in order as they come.

Memory is that of the bands in flight, whatever the size of a weight or of the checkpoint: a weight larger
than a band is read twice, first for its largest magnitude.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from n3c.ir.formats import FORMATS, NVFP4_BLOCK

from .checkpoint import Checkpoint, file_error
from .layout import KEEP, Shard, Weight
from .packing import (
    Array,
    NotFiniteError,
    Packed,
    Search,
    block_maxima,
    fp8_scale,
    largest,
    nvfp4_scale_2,
    pack_fp8_rows,
    pack_nvfp4_rows,
)
from .resume import Done, Journal

BAND_BYTES = 64 << 20
"""Source bytes that are packed at once: large enough to be quick, small enough for many at once."""
IN_FLIGHT_BYTES = 256 << 20
"""Source bytes whose bands have been handed to the cores and not yet been written."""
JOURNAL_BYTES = 256 << 20
"""Result bytes after which what is done is made safe."""
_FLOATS = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of a stored tensor, `start` bytes after its beginning."""

    name: str
    start: int
    data: bytes | memoryview


@dataclass(frozen=True, slots=True)
class Band:
    """A packed band of rows."""

    pieces: tuple[Piece, ...]
    figures: tuple[float, float, float]
    """Σ w², Σ error², and that of the other block shape."""


class Quantizer:
    """Packs the weights of one checkpoint."""

    def __init__(
        self, checkpoint: Checkpoint, weights: Sequence[Weight], search: Search, band_bytes: int = BAND_BYTES
    ) -> None:
        self._checkpoint = checkpoint
        self._search: Search = search
        self._band_bytes = band_bytes
        self._weights = {weight.name: weight for weight in weights}

    def bands(self, weight: Weight) -> list[tuple[int, int]]:
        """Return the rows of each band; multiples of 16, so that no block is cut."""
        rows = weight.shape[0] if weight.shape else 1
        size = self._checkpoint.bytes(weight.name)
        if size <= self._band_bytes or len(weight.shape) < 2 or size % rows:
            return [(0, rows)]
        step = max(NVFP4_BLOCK, self._band_bytes * rows // size // NVFP4_BLOCK * NVFP4_BLOCK)
        return [(first, min(first + step, rows)) for first in range(0, rows, step)]

    def size(self, weight: Weight) -> int:
        """Return the bytes of a weight in the source."""
        return self._checkpoint.bytes(weight.name)

    def pack(self, weight: Weight, first: int, last: int, amax: np.float32 | None) -> Band:
        """Read and pack rows `first` to `last`; without `amax` they are the whole weight."""
        if weight.format == KEEP:
            pieces = [self._carried(weight, first, last)]
            figures = (0.0, 0.0, 0.0)
        else:
            rows = self._read(weight, first, last)
            packed, of_matrix = self._packed(weight, rows, first, amax)
            pieces = [Piece(weight.name, first * packed.codes.shape[1], _raw(packed.codes))]
            names = FORMATS[weight.format].part_names(weight.name)
            if packed.scales.size:
                pieces.append(Piece(names["scale"], first * packed.scales.shape[1], _raw(packed.scales)))
            if first == 0:
                pieces.append(Piece(names["scale_2" if packed.scales.size else "scale"], 0, of_matrix.tobytes()))
            figures = (packed.signal, packed.noise, packed.other_noise)
        if first == 0:
            pieces += [Piece(name, 0, np.float32(value).tobytes()) for name, value in weight.scalars]
        return Band(tuple(pieces), figures)

    def _carried(self, weight: Weight, first: int, last: int) -> Piece:
        """Return rows as they are stored, of whatever type; N3CError where a weight of the spec is not finite."""
        size, rows = self._checkpoint.bytes(weight.name), max(1, weight.shape[0] if weight.shape else 1)
        start = size * first // rows
        data = self._checkpoint.read_bytes(weight.name, start, size * last // rows - start)
        if weight.role and weight.dtype in _FLOATS:
            shape = (last - first, *weight.shape[1:]) if weight.shape else ()
            self._largest(weight, data.view(self._checkpoint.dtype(weight.name)).reshape(shape), first)
        return Piece(weight.name, start, data.data)

    def _packed(self, weight: Weight, rows: Array, first: int, amax: np.float32 | None) -> tuple[Packed, np.float32]:
        """Return the packed rows and the scale of the matrix."""
        if FORMATS[weight.format].blocked:
            with self._naming(weight, first):
                maxima, found = block_maxima(rows)
            scale_2 = nvfp4_scale_2(found if amax is None else amax, self._search)
            packed = pack_nvfp4_rows(rows, maxima, scale_2, weight.block_rows, self._search, measure=True)
            return packed, scale_2
        found = self._largest(weight, rows, first)
        scale = fp8_scale(found if amax is None else amax)
        return pack_fp8_rows(rows, scale), scale

    def largest(self, weight: Weight, first: int, last: int) -> np.float32:
        """Return the largest magnitude in a band."""
        return self._largest(weight, self._read(weight, first, last), first)

    def scale_bands(self, weight: Weight) -> list[tuple[Weight, int, int]]:
        """Return the bands whose largest magnitude must be known before `weight` can be packed."""
        if weight.format == KEEP:
            return []
        together = [self._weights[name] for name in weight.scaled_with or (weight.name,)]
        bands = [(each, first, last) for each in together for first, last in self.bands(each)]
        return bands if len(bands) > 1 else []

    def _read(self, weight: Weight, first: int, last: int) -> Array:
        if not weight.shape:
            return self._checkpoint.read(weight.name)
        return self._checkpoint.read_rows(weight.name, first, last)

    def _largest(self, weight: Weight, rows: Array, first: int) -> np.float32:
        if weight.dtype not in _FLOATS or not rows.size:
            return np.float32(0)
        with self._naming(weight, first):
            return largest(rows)

    @contextmanager
    def _naming(self, weight: Weight, first: int) -> Iterator[None]:
        """Turn NotFiniteError into N3CError (exit code 6) with tensor and index; `first` is the first row read."""
        try:
            yield
        except NotFiniteError as error:
            index = (error.index[0] + first, *error.index[1:]) if error.index else ()
            message = f"tensor `{weight.name}` holds {error.value} at {list(index)}"
            raise file_error("E0607", message, self._checkpoint.file(weight.name)) from None


def _raw(array: Array) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def make_shard(
    shard: Shard,
    path: Path,
    done: Done,
    quantizer: Quantizer,
    *,
    journal: Journal,
    pool: ThreadPoolExecutor,
    progress: Callable[[int], None],
    journal_bytes: int = JOURNAL_BYTES,
) -> None:
    """Make what is missing of a shard; `done` grows as weights reach the disk. `progress` gets result bytes.

    What is done is made safe each time `journal_bytes` of the result were written.
    """
    with path.open("r+b" if done.weights else "w+b") as file:
        if done.weights == 0:
            file.truncate(shard.size)
            file.write(shard.header)
        fresh: dict[str, list[float]] = {}
        unsafe = 0
        figures = [0.0, 0.0, 0.0]
        for weight, band, is_last in _packed_in_order(shard.weights[done.weights :], quantizer, pool):
            for piece in band.pieces:
                file.seek(shard.offsets[piece.name] + piece.start)
                file.write(piece.data)
                unsafe += len(piece.data)
                progress(len(piece.data))
            figures = [total + more for total, more in zip(figures, band.figures, strict=True)]
            if not is_last:
                continue
            done.weights += 1
            if weight.format != KEEP:
                fresh[weight.name] = done.figures[weight.name] = figures
            figures = [0.0, 0.0, 0.0]
            if unsafe >= journal_bytes or done.weights == len(shard.weights):
                file.flush()
                os.fsync(file.fileno())
                journal.write(shard.file, done.weights, fresh)
                fresh, unsafe = {}, 0


def _packed_in_order(
    weights: Sequence[Weight], quantizer: Quantizer, pool: ThreadPoolExecutor
) -> Iterator[tuple[Weight, Band, bool]]:
    """Yield the bands of each weight, the last one marked, packed ahead by the cores as far as memory allows."""
    waiting: deque[tuple[Weight, Future[Band], bool, int]] = deque()
    in_flight = 0
    try:
        for weight in weights:
            amax: np.float32 | None = None
            scale_bands = quantizer.scale_bands(weight)
            if scale_bands:
                amax = np.float32(max(pool.map(lambda band: quantizer.largest(*band), scale_bands)))
            bands = quantizer.bands(weight)
            size = quantizer.size(weight) // len(bands)
            for first, last in bands:
                while waiting and in_flight + size > IN_FLIGHT_BYTES:
                    in_flight -= waiting[0][3]
                    yield _oldest(waiting)
                waiting.append(
                    (weight, pool.submit(quantizer.pack, weight, first, last, amax), last == bands[-1][1], size)
                )
                in_flight += size
        while waiting:
            yield _oldest(waiting)
    finally:
        for _, future, _, _ in waiting:
            future.cancel()


def _oldest(waiting: deque[tuple[Weight, Future[Band], bool, int]]) -> tuple[Weight, Band, bool]:
    weight, future, is_last, _ = waiting.popleft()
    return weight, future.result(), is_last
