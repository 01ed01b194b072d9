"""The layout of a quantized checkpoint: every tensor, its shard and its first byte, from headers alone.

All of it is known before a weight is read, so shards can be made in any order, on several machines, and
continued after a crash, and always come out the same. Names are ModelOpt's (`export_hf_checkpoint`),
those of `n3c.ir.formats`. `input_scale` is there where activations were calibrated, and of every FP8 linear.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from n3c.ir.formats import CACHE_SCALES, FORMATS, INPUT_SCALE
from n3c.ir.program import Program
from n3c.ir.source import Fp8, Nvfp4, tensor_names
from n3c.ir.types import DType, TensorType

from .checkpoint import Checkpoint
from .header import BITS, header_bytes, stored_as, stored_bytes
from .packing import Search

MAX_SHARD_BYTES = 5_000_000_000
KEEP = "keep"
"""The format of tensors that are carried over byte for byte."""

Stored = tuple[str, tuple[int, ...]]
"""Element type and shape of a stored tensor."""


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor of the source, and what is stored for it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    role: str
    rule: str
    """The deciding rule of the spec, or why there is none."""
    format: str
    """nvfp4, w4a16_nvfp4, fp8, or `KEEP`."""
    block_rows: int
    scaled_with: tuple[str, ...]
    """Weights that have one scale of a matrix, this one among them; empty: its own."""
    scalars: tuple[tuple[str, float], ...]
    """float32 tensors that are stored after it: input_scale, k_scale, v_scale."""
    spelling: str
    """Its name in the files of the result: that of the source in a multimodal checkpoint, else `name`."""

    @property
    def scales_input(self) -> bool:
        """Whether the scale of its linear's input is stored, so that readers quantize activations."""
        return any(name.endswith(INPUT_SCALE) for name, _ in self.scalars)

    @property
    def module(self) -> str:
        """Return the name of the linear."""
        return self.name.removesuffix(".weight")

    def in_file(self, stored: str) -> str:
        """Return the name in a file of a tensor that is stored for it, or of its module."""
        return self.spelling.removesuffix(".weight") + stored.removeprefix(self.module)

    def stored(self) -> dict[str, Stored]:
        """Return the tensors that are stored for it, in their order."""
        found: dict[str, Stored] = {self.name: (self.dtype, self.shape)}
        if self.format != KEEP:
            weight = TensorType(DType.BF16, self.shape)
            parts = FORMATS[self.format].parts
            found = {self.name + part.suffix: stored_as(part.type(weight)) for part in parts}
        return found | {name: ("F32", ()) for name, _ in self.scalars}


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of the result."""

    file: str
    weights: tuple[Weight, ...]
    header: bytes
    offsets: Mapping[str, int]
    """Stored tensor → its first byte in the file."""
    names: Mapping[str, str]
    """Stored tensor → its name in the file."""
    size: int


def plan_weights(
    program: Program,
    checkpoint: Checkpoint,
    input_scales: Mapping[str, float],
    kv_scales: Mapping[str, float],
    spellings: Mapping[str, str] | None = None,
) -> list[Weight]:
    """Return every tensor of `checkpoint` in the order of its files, with the format that the passes gave it.

    `program` has been through the pass `quantize`. `input_scales` are by module, `kv_scales` by tensor. `spellings` are
    the names in the files of the result, where they are others.
    """
    rules = {entry.name: entry.rule for entry in program.ledger}
    known: dict[str, _Decided] = {}
    for parameter in program.parameters.values():
        source, rule = parameter.source, rules.get(parameter.name, "")
        decided = _Decided(parameter.role, rule)
        if isinstance(source, (Nvfp4, Fp8)):
            if source.part != "codes":
                continue
            rows = source.block_rows if isinstance(source, Nvfp4) else 0
            decided = _Decided(parameter.role, rule, parameter.format, rows, source.scaled_with)
        known |= dict.fromkeys(tensor_names(source), decided)
    weights: list[Weight] = []
    for name in checkpoint:
        reason = "of another model" if name in checkpoint.others else "not in the spec"
        decided = known.get(name, _Decided("", reason))
        spelling = spellings.get(name, name) if spellings is not None else name
        weights.append(_weight(name, checkpoint, decided, input_scales, kv_scales, spelling))
    return weights


@dataclass(frozen=True, slots=True)
class _Decided:
    """What the passes say of a tensor."""

    role: str
    rule: str
    format: str = KEEP
    block_rows: int = 0
    scaled_with: tuple[str, ...] = ()


def _weight(
    name: str,
    checkpoint: Checkpoint,
    decided: _Decided,
    input_scales: Mapping[str, float],
    kv_scales: Mapping[str, float],
    spelling: str,
) -> Weight:
    dtype, shape = checkpoint.info(name)
    format_ = decided.format
    module = name.removesuffix(".weight")
    scalars: list[tuple[str, float]] = []
    if format_ != KEEP and FORMATS[format_].input_divisor:
        scale = input_scales.get(module, FORMATS[format_].uncalibrated_scale)
        scalars += [] if scale is None else [(module + INPUT_SCALE, scale)]
    if name.endswith(".weight"):
        scalars += [(module + kv, kv_scales[module + kv]) for kv in CACHE_SCALES if module + kv in kv_scales]
    return Weight(
        name,
        dtype,
        shape,
        role=decided.role,
        rule=decided.rule,
        format=format_,
        block_rows=decided.block_rows,
        scaled_with=decided.scaled_with,
        scalars=tuple(scalars),
        spelling=spelling,
    )


def plan_shards(weights: Sequence[Weight], max_bytes: int = MAX_SHARD_BYTES) -> list[Shard]:
    """Cut `weights` into files of at most `max_bytes`; what is stored for one weight stays together."""
    groups: list[list[Weight]] = [[]]
    room = max_bytes - 8
    for weight in weights:
        stored = weight.stored()
        data = sum(stored_bytes(dtype, shape) for dtype, shape in stored.values())
        entry = sum(len(json.dumps(name)) + 120 for name in stored)  # its lines in the header, at most
        if groups[-1] and data + entry > room:
            groups.append([])
            room = max_bytes - 8
        groups[-1].append(weight)
        room -= data + entry
    return [_shard(number, len(groups), group) for number, group in enumerate(groups, start=1)]


def _shard(number: int, total: int, weights: Sequence[Weight]) -> Shard:
    tensors = {name: stored for weight in weights for name, stored in weight.stored().items()}
    names = {name: weight.in_file(name) for weight in weights for name in weight.stored()}
    # float32 scalars after uint8 codes would be misaligned: the widest elements first, as the format's library does
    ordered = dict(sorted(tensors.items(), key=lambda item: -BITS[item[1][0]]))
    header = header_bytes({names[name]: stored for name, stored in ordered.items()})
    offsets: dict[str, int] = {}
    at = len(header)
    for name, (dtype, shape) in ordered.items():
        offsets[name] = at
        at += stored_bytes(dtype, shape)
    file = "model.safetensors" if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors"
    return Shard(file, tuple(weights), header, offsets, names, at)


def index_json(shards: Sequence[Shard]) -> dict[str, Any]:
    """Return model.safetensors.index.json."""
    weight_map = {name: shard.file for shard in shards for name in shard.names.values()}
    total = sum(shard.size - len(shard.header) for shard in shards)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def fingerprint(shards: Sequence[Shard], search: Search) -> str:
    """Return a hash of all that decides the bytes of the result, but for the weights themselves."""
    digest = hashlib.sha256(f"n3c quantize 1 {search}".encode())
    for line in _lines(shards):
        digest.update(line.encode())
    return digest.hexdigest()


def _lines(shards: Sequence[Shard]) -> Iterator[str]:
    for shard in shards:
        yield f"{shard.file} {hashlib.sha256(shard.header).hexdigest()}"
        for w in shard.weights:
            yield f"{w.name} {w.dtype} {w.shape} {w.format} {w.block_rows} {w.scaled_with} {w.scalars} {w.rule}"
