"""Reading a result back: is it what the ledger says, and how far is it from the source?

Every tensor's name, type and shape is compared with the plan. Of every shard a sample of weights is read,
and the numpy form of the format (`nvfp4.py`, written independently of the compiled kernel) says which codes
the source and the stored scales must give; what is carried over must have the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError, Span
from n3c.ir.formats import FORMATS, NVFP4_BLOCK

from .checkpoint import Checkpoint
from .layout import KEEP, Shard, Weight
from .nvfp4 import Nvfp4Matrix, dequantize, e2m1_codes, pack

SAMPLED = 8
"""Weights of each role in a shard of which some rows are read."""
ROWS = 256
Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Checked:
    """The result of sampling one role and format."""

    role: str
    format: str
    weights: int
    relative_error: float
    """Σ (dequantized − w)² / Σ w² over the sample; 0 for what is carried over."""


def check(source: Checkpoint, result: Checkpoint, shards: Sequence[Shard]) -> list[Checked]:
    """Compare `result` with the plan and with `source`; N3CError (exit code 6) lists what is not as planned."""
    faults = _misplaced(result, shards)
    sums: dict[tuple[str, str], list[float]] = {}
    for shard in shards if not faults else ():
        for weight in _sample(shard):
            signal, noise = _compare(weight, source, result, faults)
            found = sums.setdefault((weight.role or "other", weight.format), [0, 0.0, 0.0])
            found[0] += 1
            found[1] += signal
            found[2] += noise
    if faults:
        place = Span(str(result.directory))
        raise N3CError([Diagnostic("E0618", fault, place) for fault in faults[:20]], ExitCode.FILE)
    return [
        Checked(role, format_, int(count), noise / signal if signal else 0.0)
        for (role, format_), (count, signal, noise) in sorted(sums.items())
    ]


def _misplaced(result: Checkpoint, shards: Sequence[Shard]) -> list[str]:
    """Return what is wrong with names, types and shapes."""
    planned = {name: stored for shard in shards for weight in shard.weights for name, stored in weight.stored().items()}
    faults = [f"tensor `{name}` is missing from the result" for name in planned if name not in result]
    faults += [f"tensor `{name}` of the result was not planned" for name in result if name not in planned]
    for name in planned if not faults else ():
        if result.info(name) != planned[name]:
            faults.append(f"tensor `{name}` is {result.info(name)}, planned was {planned[name]}")
    return faults


def _sample(shard: Shard) -> list[Weight]:
    """Return some weights of each role and format, spread over the shard."""
    by_role: dict[tuple[str, str], list[Weight]] = {}
    for weight in shard.weights:
        by_role.setdefault((weight.role, weight.format), []).append(weight)
    return [weight for found in by_role.values() for weight in found[:: max(1, len(found) // SAMPLED)][:SAMPLED]]


def _compare(weight: Weight, source: Checkpoint, result: Checkpoint, faults: list[str]) -> tuple[float, float]:
    """Compare some rows; return Σ w² and Σ error² of them."""
    if weight.format == KEEP:
        length = min(source.bytes(weight.name), 1 << 20)
        start = source.bytes(weight.name) - length
        if not np.array_equal(
            source.read_bytes(weight.name, start, length), result.read_bytes(weight.name, start, length)
        ):
            faults.append(f"tensor `{weight.name}` is not what the source has")
        return 0.0, 0.0
    first = weight.shape[0] // 2 // NVFP4_BLOCK * NVFP4_BLOCK
    last = min(first + ROWS, weight.shape[0])
    w = source.read_rows(weight.name, first, last)
    compare = _nvfp4 if FORMATS[weight.format].blocked else _fp8
    codes, wanted, dequantized = compare(weight, result, w, first, last)
    if not np.array_equal(codes, wanted):
        differing = int((codes != wanted).sum())
        faults.append(f"`{weight.name}`: {differing} of {codes.size} bytes are not what its scales give")
    exact = w.astype(np.float64)
    if not np.isfinite(dequantized).all():
        faults.append(f"`{weight.name}` is not finite when it is read")
    return float((exact**2).sum()), float(((dequantized - exact) ** 2).sum())


def _nvfp4(weight: Weight, result: Checkpoint, w: Array, first: int, last: int) -> tuple[Array, Array, Array]:
    codes = result.read_rows(weight.name, first, last).view(np.uint8)
    names = FORMATS[weight.format].part_names(weight.name)
    scale = result.read_rows(names["scale"], first, last)
    scale_2 = np.float32(result.read(names["scale_2"]).item())
    step: NDArray[np.float32] = np.repeat(scale.astype(np.float32) * scale_2, NVFP4_BLOCK, axis=-1)
    with np.errstate(all="ignore"):
        wanted = pack(e2m1_codes(np.divide(w, step, dtype=np.float32)))
    return codes, wanted, dequantize(Nvfp4Matrix(codes, scale, scale_2))


def _fp8(weight: Weight, result: Checkpoint, w: Array, first: int, last: int) -> tuple[Array, Array, Array]:
    codes = result.read_rows(weight.name, first, last)
    scale = np.float32(result.read(FORMATS[weight.format].part_names(weight.name)["scale"]).item())
    ratio = w.astype(np.float32) / scale
    if w.dtype == ml_dtypes.bfloat16:
        ratio = ratio.astype(ml_dtypes.bfloat16)
    wanted = ratio.astype(ml_dtypes.float8_e4m3fn)
    return codes.view(np.uint8), wanted.view(np.uint8), codes.astype(np.float32) * scale
