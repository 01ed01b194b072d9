"""Making shards: neither the size of a band nor the place of an interruption changes a byte of the result."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open

from n3c.backends.modelopt.quantizer import Job, quantize_checkpoint
from n3c.backends.progress import SILENT
from n3c.backends.safetensors.checkpoint import Checkpoint
from n3c.backends.safetensors.header import BITS, header_bytes, stored_bytes
from n3c.backends.safetensors.layout import plan_shards, plan_weights
from n3c.backends.safetensors.resume import WorkDirectory
from n3c.backends.safetensors.stream import Quantizer
from n3c.ir.diagnostics import N3CError
from n3c.passes.lower.model import lower
from n3c.passes.pipelines import quantize_pass
from n3c.specs.huggingface import export_config
from support.checkpoints import policy_spec, write_checkpoint
from support.command import tree

BANDS = (1, 4000, 9000)
"""Bytes of a band: 16 rows each, a few bands of a weight, and whole small weights beside cut ones."""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Return a job that takes every weight in one band."""
    folder = tmp_path_factory.mktemp("stream")
    write_checkpoint(folder / "source", policy_spec())
    program = lower(policy_spec())
    quantize_pass(policy_spec()).run(program)
    return Job(folder / "source", folder / "whole", program, export_config(policy_spec()), threads=2)


@pytest.fixture(scope="module")
def whole(job: Job) -> dict[str, bytes]:
    assert quantize_checkpoint(job, SILENT).finished
    return tree(job.out)


@pytest.mark.parametrize("search", ["none", "mse"])
@pytest.mark.parametrize("band_bytes", BANDS)
def test_the_size_of_a_band_changes_no_byte(job: Job, tmp_path: Path, band_bytes: int, search: str) -> None:
    searched = replace(job, search="mse" if search == "mse" else "none", out=tmp_path / "whole")
    quantize_checkpoint(searched, SILENT)
    quantize_checkpoint(replace(searched, out=tmp_path / "out", band_bytes=band_bytes), SILENT)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_tensors_of_every_type_are_carried(tmp_path: Path) -> None:
    """What the spec has no place for keeps its bytes: types that numpy lacks, NaN, empty and scalar tensors."""
    spec = replace(policy_spec(), mtp=None)
    write_checkpoint(tmp_path / "source", replace(spec, quantization=None), shards=1)
    source = tmp_path / "source/model.safetensors"
    shapes = ((16, 6), (0,), (0, 4), (3, 0), (), (1, 2, 8))
    tensors = {
        f"mtp.{dtype}.{i}": (dtype, shape)
        for dtype in BITS
        for i, shape in enumerate(shapes)
        if math.prod(shape) * BITS[dtype] % 8 == 0
    }
    held = Checkpoint(tmp_path / "source")
    plan = {name: held.info(name) for name in held} | tensors
    header = header_bytes(plan)
    carried = {name: b"\xff" * stored_bytes(*stored) for name, stored in tensors.items()}  # NaN of every float
    data = b"".join(bytes(held.read_bytes(name, 0, held.bytes(name))) for name in held)
    source.write_bytes(header + data + b"".join(carried.values()))
    program = lower(spec)
    quantize_pass(replace(spec, quantization=None)).run(program)
    for band_bytes in (1, 1 << 20):
        out = tmp_path / str(band_bytes)
        job = Job(tmp_path / "source", out, program, export_config(spec), threads=2, band_bytes=band_bytes)
        assert quantize_checkpoint(job, SILENT).finished
        result = Checkpoint(out)
        for name, expected in carried.items():
            assert result.info(name) == tensors[name]
            assert bytes(result.read_bytes(name, 0, result.bytes(name))) == expected, name
    with safe_open(tmp_path / "1/model.safetensors", framework="numpy") as file:  # the library knows them all
        assert set(tensors) <= set(file.keys())


def test_small_bands_cut_weights(job: Job) -> None:
    """The sizes above do what they are there for: weights of every format in several bands, no block cut."""
    checkpoint = Checkpoint(job.source)
    weights = plan_weights(job.program, checkpoint, {}, {})
    cut: set[str] = set()
    for weight in weights:
        bands = Quantizer(checkpoint, weights, "none", BANDS[1]).bands(weight)
        assert [first for first, _ in bands[1:]] == [last for _, last in bands[:-1]]
        assert bands[0][0] == 0
        assert bands[-1][1] == (weight.shape[0] if weight.shape else 1)
        assert all(first % 16 == 0 for first, _ in bands)
        if len(bands) > 1:
            cut.add(weight.format)
    assert cut >= {"nvfp4", "fp8", "keep"}


class PowerLossError(Exception):
    """The machine lost power."""


class PowerLossAfter:
    """Progress that raises `PowerLossError` at the n-th step."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def phase(self, name: str) -> None:
        """Ignore a phase."""

    def step(self, what: str, done: int = 0, total: int = 0) -> None:
        """Count a step."""
        self.left -= 1
        if self.left < 0:
            raise PowerLossError

    def item(self, what: str, done: int, total: int) -> None:
        """Ignore an item."""


@pytest.mark.parametrize("steps", [1, 7, 40, 100])
@pytest.mark.parametrize(("band_bytes", "journal_bytes"), [(1 << 26, 1), (4000, 1), (4000, 20_000)])
def test_an_interruption_inside_a_shard_changes_no_byte(
    job: Job, whole: dict[str, bytes], tmp_path: Path, band_bytes: int, journal_bytes: int, steps: int
) -> None:
    broken = replace(job, out=tmp_path / "out", band_bytes=band_bytes, journal_bytes=journal_bytes)
    with pytest.raises(PowerLossError):
        quantize_checkpoint(broken, PowerLossAfter(steps))
    assert not broken.out.exists()
    if steps == 100:
        assert 0 < done_of_the_shard(broken) < len(list(Checkpoint(job.source)))
    assert quantize_checkpoint(replace(broken, resume=True), SILENT).finished
    assert tree(broken.out) == whole


def done_of_the_shard(job: Job) -> int:
    """Return how many weights of the only shard an interrupted run left on the disk."""
    weights = plan_weights(job.program, Checkpoint(job.source), {}, {})
    (shard,) = plan_shards(weights)
    return WorkDirectory(job.out).done([shard])[shard.file].weights


def test_a_resumed_run_begins_where_the_journal_ends(job: Job, tmp_path: Path) -> None:
    """What the journal says is done is not packed again: the file holds what it held."""
    broken = replace(job, out=tmp_path / "out", journal_bytes=1)
    with pytest.raises(PowerLossError):
        quantize_checkpoint(broken, PowerLossAfter(100))
    weights = plan_weights(job.program, Checkpoint(job.source), {}, {})
    (shard,) = plan_shards(weights)
    file = WorkDirectory(broken.out).result / shard.file
    first = shard.weights[0]
    with file.open("r+b") as opened:
        opened.seek(shard.offsets[first.name])
        kept = bytes(byte ^ 1 for byte in opened.read(1))
        opened.seek(shard.offsets[first.name])
        opened.write(kept)
    with pytest.raises(N3CError, match=first.name):
        quantize_checkpoint(replace(broken, resume=True), SILENT)


@pytest.mark.parametrize(
    "damage",
    [
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"weights": 99999}',
        b'{"shard": [], "weights": 1, "figures": {}}',
        b'{"shard": "NAME", "weights": 1e999, "figures": {}}',
        b'{"shard": "NAME", "weights": true, "figures": {}}',
        b'{"shard": "NAME", "weights": 1000000, "figures": {}}',
        b'{"shard": "NAME", "weights": 30, "figures": []}',
        b'{"shard": "NAME", "weights": 30, "figures": {"x": [NaN, 1.0, 1.0]}}',
        None,
    ],
)
def test_a_damaged_journal_costs_work_and_no_byte(
    job: Job, whole: dict[str, bytes], tmp_path: Path, damage: bytes | None
) -> None:
    """A line may be put behind the true ones, or (None) the first of them lost."""
    broken = replace(job, out=tmp_path / "out", band_bytes=4000, journal_bytes=1)
    with pytest.raises(PowerLossError):
        quantize_checkpoint(broken, PowerLossAfter(100))
    (shard,) = plan_shards(plan_weights(job.program, Checkpoint(job.source), {}, {}))
    (journal,) = WorkDirectory(broken.out).state.glob("*.jsonl")
    lines = [line for line in journal.read_bytes().split(b"\n") if line]
    told = [line for line in lines if b'"figures": {}' not in line]
    if damage is None:
        lines.remove(told[0])
    else:
        lines.append(damage.replace(b"NAME", shard.file.encode()))
    journal.write_bytes(b"\n".join(lines) + b"\n")
    assert quantize_checkpoint(replace(broken, resume=True), SILENT).finished
    assert tree(broken.out) == whole
