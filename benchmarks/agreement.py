"""Roads that must end in the same place: with drafts and without, in chunks and token by token, by format.

Where activations are rounded, sums of another order tip a value to its other neighbour now and then. That this is all
that sets roads apart is shown by the reference evaluation: where linears of the one road read what they read on the
other, both have the same logits.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from n3c.backends.safetensors.checkpoint import Checkpoint
from n3c.compiler import quantize
from n3c.ir.formats import FORMATS
from n3c.passes.serving import serve
from n3c.runtime.engines.interface import Array, Engine
from n3c.runtime.engines.onnxruntime.open import cpu_engine
from n3c.runtime.engines.reference.engine import ReferenceEngine
from n3c.runtime.generation.capacity import Capacity
from n3c.runtime.generation.drafter import Drafter, MtpDrafter
from n3c.specs.load import load_spec
from n3c.specs.schema import Quantization, Rule, Spec

from .distillation import KEPT
from .roads import (
    Note,
    Parting,
    by_verification,
    continued,
    in_chunks,
    largest_difference,
    partings,
    token_by_token,
    unheard,
)
from .roundings import Roundings
from .trained import prepare, train

TITLE = "Agreement of drafts, chunks and single tokens"

CHUNKS = (1, 7, 256, 1000)
BATCH = 25


@dataclass(frozen=True, slots=True)
class Model:
    """A quantized checkpoint, and how it is served."""

    spec: Spec
    checkpoint: Checkpoint

    @property
    def format(self) -> str:
        """The format of its linears."""
        assert self.spec.quantization is not None
        return self.spec.quantization.format

    def serving(self, **changes: object) -> Model:
        """Return the same with other settings of [serving]."""
        return replace(self, spec=replace(self.spec, serving=replace(self.spec.serving, **changes)))  # type: ignore[arg-type]

    def engine(self, batch: int = 1) -> Engine:
        """Return ONNX Runtime with all entry points."""
        served = serve(self.spec)
        return cpu_engine(served, self.spec, list(served.program.entry_points), [batch], self.checkpoint)

    def reference(self, roundings: Roundings) -> Engine:
        """Return the reference evaluation, which `roundings` takes down."""
        capacity = self.spec.serving.max_seq_len
        program = serve(self.spec).program
        return ReferenceEngine(program, self.checkpoint, batch_sizes=[1], capacity=capacity, choice=roundings)


def run(quick: bool) -> Iterator[str]:
    """Yield the tables."""
    steps, prompts, new, tokens = (10, 10, 8, 40) if quick else (300, 500, 32, 1003)
    path = Path(__file__).parents[1] / "specs" / "tiny.toml"
    with tempfile.TemporaryDirectory() as folder:
        spec = load_spec(path)[0]
        text = prepare(spec, Path(folder))
        train(Path(folder), Path(folder) / "run", "--steps", str(steps), "--batch-size", "8", "--seq-len", "64",
              "--lr", "0.003", "--val-every", "0")  # fmt: skip
        data = text.read_bytes()[-200_000:]
        models = [_quantized(spec, name, Path(folder), text) for name in ("nvfp4", "fp8", "w4a16_nvfp4")]
        yield f"specs/tiny.toml after {steps} steps, every linear but head, router and MTP in the format; ONNX Runtime."
        yield from _generations(models, _prompts(data, prompts), new)
        yield ""
        yield from _chunks(models, list(data[:tokens]))


def _quantized(spec: Spec, name: str, folder: Path, text: Path) -> Model:
    rules = (Rule("bf16", roles=KEPT),)
    spec = replace(spec, quantization=Quantization(name, (1, 16), rules))  # type: ignore[arg-type]
    out = folder / name
    quantize(spec, weights=folder / "run" / "export", output=out, calibration=text, calibration_samples=32)
    return Model(spec, Checkpoint(out))


def _prompts(data: bytes, count: int) -> list[list[int]]:
    """Return prompts of 1 to 60 bytes: every other one random bytes, the others from the text."""
    random = np.random.default_rng(0)
    prompts: list[list[int]] = []
    for i in range(count):
        length = int(random.integers(1, 61))
        at = int(random.integers(len(data) - length))
        prompts.append(random.integers(0, 256, length).tolist() if i % 2 else list(data[at : at + length]))
    return prompts


def rounds(model: Model) -> bool:
    """Return whether activations are rounded."""
    return FORMATS[model.format].input_divisor is not None and model.spec.serving.activations == "as_format"


def _both_ways(models: Sequence[Model]) -> list[Model]:
    """Return each model as its format says, and those that round activations without that."""
    return [*models, *(m.serving(activations="weight_only") for m in models if rounds(m))]


# ------------------------------------------------------------------------------------------ drafts


@dataclass(frozen=True, slots=True)
class Compared:
    """Greedy generations without drafts and with them."""

    parted: list[Parting]
    rest: list[float]
    """Of each: the largest difference of a logit there in the reference, where both roads round alike."""
    tokens_a_round: float
    largest: float
    """Difference of a log-probability before tokens differ."""
    smallest: float
    """Margin there."""


def generations(model: Model, prompts: Sequence[Sequence[int]], new: int, drafter: Drafter) -> Compared:
    """Continue `prompts` without drafts and with those of `drafter`."""
    engine, capacity = model.engine(BATCH), Capacity.of(model.spec)
    plain, _ = continued(engine, prompts, new, capacity, None)
    drafted, tokens_a_round = continued(engine, prompts, new, capacity, drafter)
    parted, largest, smallest = partings(plain, drafted)
    rest = [
        replayed_difference(model, prompts[p.prompt], [*prompts[p.prompt], *plain[p.prompt].tokens[: p.place]])
        for p in parted
    ]
    return Compared(parted, rest, tokens_a_round, largest, smallest)


def replayed_difference(model: Model, prompt: Sequence[int], ids: Sequence[int]) -> float:
    """Return how far logits behind `ids` are apart between decoding and verification of the same rounded numbers."""
    first = Roundings(len(ids))
    engine = model.reference(first)
    logits = {**in_chunks(engine, prompt, first.at), **token_by_token(engine, ids, len(prompt), first.at)}
    again = Roundings(len(ids), given=first)
    engine = model.reference(again)
    other = {**in_chunks(engine, prompt, again.at), **by_verification(engine, ids, len(prompt), again.at)}
    return largest_difference({len(ids) - 1: logits[len(ids) - 1]}, other)


def _generations(models: Sequence[Model], prompts: Sequence[Sequence[int]], new: int) -> Iterator[str]:
    yield f"{len(prompts)} greedy continuations by {new} tokens, without drafts and with those of MTP. Differences are"
    yield "of log-probabilities before any token differs; a margin is the likeliest logit less the next one.\n"
    yield "| format | activations | tokens a round | continuations that differ | largest difference | smallest margin |"
    yield "|---|---|---:|---:|---:|---:|"
    differing: list[tuple[str, Parting, float]] = []
    for model in _both_ways(models):
        found = generations(model.serving(max_seq_len=128), prompts, new, MtpDrafter())
        differing += [(model.format, p, rest) for p, rest in zip(found.parted, found.rest, strict=True)]
        yield (
            f"| {model.format} | {'rounded' if rounds(model) else 'as they are'} | {found.tokens_a_round:.2f} |"
            f" {len(found.parted)} | {found.largest:.1e} | {found.smallest:.1e} |"
        )
    yield "\nEvery token that differs: the margin of the road without drafts, the largest difference there, and the one"
    yield "in the reference evaluation where both roads round alike.\n"
    yield "| format | prompt | token | margin | difference | rounding alike |"
    yield "|---|---:|---:|---:|---:|---:|"
    for name, parted, rest in differing:
        yield f"| {name} | {parted.prompt} | {parted.place} | {parted.margin:.1e} | {parted.apart:.1e} | {rest:.1e} |"


# ------------------------------------------------------------------------------------------ chunks


def _chunks(models: Sequence[Model], ids: list[int]) -> Iterator[str]:
    yield f"{len(ids)} tokens of text by prefill in chunks and then 21 by decoding, against all token by token: the"
    yield "largest difference of a logit, behind chunks and of the decoded tokens.\n"
    yield f"| format | activations | largest logit |{''.join(f' chunks of {chunk:,} |' for chunk in CHUNKS)}"
    yield f"|---|---|---:|{'---:|' * len(CHUNKS)}"
    ids, end = [*ids, *ids[:21]], len(ids)
    models = [model.serving(max_seq_len=max(len(ids), *CHUNKS)) for model in models]
    for model in _both_ways(models):
        slow = token_by_token(model.engine(), ids)
        cells = [largest_difference(slow, _read(model.serving(prefill_chunk=c).engine(), ids, end)) for c in CHUNKS]
        largest = max(float(np.abs(row).max()) for row in slow.values())
        title = f"| {model.format} | {'rounded' if rounds(model) else 'as they are'} | {largest:.1f} |"
        yield title + "".join(f" {cell:.1e} |" for cell in cells)
    yield "\nThe same in the reference evaluation: the share of roundings that the roads do not have in common, each"
    yield "going on from its own; and where the second reads what the first rounded: how many it would have rounded"
    yield "otherwise, of all, and the largest difference of a logit.\n"
    yield "| format | chunks of | not in common | tokens with another expert | tipped | share | rounding alike |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for model in models:
        if rounds(model):
            yield from _tipped(model, ids, end)


def _read(engine: Engine, ids: list[int], end: int, note: Note = unheard) -> dict[int, Array]:
    return {**in_chunks(engine, ids[:end], note), **token_by_token(engine, ids, end, note)}


def _tipped(model: Model, ids: list[int], end: int) -> Iterator[str]:
    first = Roundings(len(ids))
    slow = token_by_token(model.reference(first), ids, note=first.at)
    for chunk in CHUNKS:
        chunked = model.serving(prefill_chunk=chunk)
        own, alike = Roundings(len(ids)), Roundings(len(ids), given=first)
        _read(chunked.reference(own), ids, end, own.at)
        rest = largest_difference(slow, _read(chunked.reference(alike), ids, end, alike.at))
        yield (
            f"| {model.format} | {chunk:,} | {own.share_of(first):.1e} | {own.choices_apart(first)} of {len(ids)} |"
            f" {alike.tipped} of {alike.rounded:,} | {alike.tipped / alike.rounded:.1e} | {rest:.1e} |"
        )
