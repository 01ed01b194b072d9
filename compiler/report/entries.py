"""The roofline of entry points: operations and bytes of one call, and the time that each GPU needs at the least."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from n3c.backends.gpus import Gpu
from n3c.ir.program import EntryPoint, Parameter
from n3c.ir.types import DType
from n3c.passes.serving import Served
from n3c.specs.schema import Spec

from .blocks import Block
from .cost import read_by


@dataclass(frozen=True, slots=True)
class EntryCost:
    """One call of an entry point."""

    entry: str
    batch: int
    tokens: int
    """Of each sequence."""
    context: int
    flops: int
    bytes: int
    """Weights that are read, states read and written, caches read."""
    dtype: DType
    """The type in which most of the products are computed."""

    @property
    def intensity(self) -> float:
        """Return FLOPs a byte."""
        return self.flops / self.bytes

    def seconds(self, gpu: Gpu) -> tuple[float, str]:
        """Return the least time of a call on `gpu`, and what bounds it: `memory` or `compute`."""
        moving, computing = self.bytes / gpu.bandwidth, self.flops / gpu.peak(self.dtype)
        return (moving, "memory") if moving >= computing else (computing, "compute")

    def as_json(self, gpus: Iterable[Gpu]) -> dict[str, Any]:
        """Return one entry of `inspect --json`, key `entries`."""
        bounds = [(gpu.name, *self.seconds(gpu)) for gpu in gpus]
        return {
            "entry": self.entry,
            "batch": self.batch,
            "tokens": self.tokens,
            "context": self.context,
            "flops": self.flops,
            "bytes": self.bytes,
            "flops_per_byte": round(self.intensity, 2),
            "dtype": self.dtype.value,
            "roofline": [
                {"gpu": name, "us": round(1e6 * seconds, 2), "bound_by": bound} for name, seconds, bound in bounds
            ],
        }


def entry_costs(spec: Spec, served: Served, blocks: Sequence[Block], context: int, batch: int) -> tuple[EntryCost, ...]:
    """Return the costs of the entry points; prefill is one chunk of one sequence, which ends at `context`."""
    return tuple(
        _cost(spec, served, blocks, entry, context, 1 if entry.name == "prefill" else batch)
        for entry in served.program.entry_points.values()
    )


def _cost(
    spec: Spec, served: Served, blocks: Sequence[Block], entry: EntryPoint, context: int, batch: int
) -> EntryCost:
    program, tokens = served.program, batch * entry.tokens
    by_label = {block.label: block.variant for block in blocks}
    flops, labels = 0, dict.fromkeys(call.label for call in entry.calls)
    products: dict[DType, int] = {}
    for label in labels:
        variant = by_label[label]
        once = variant.kind == "head" and entry.name == "prefill"  # of the last token alone
        work = variant.flops * (batch if once else tokens)
        flops += work
        dtype = _dtype(next(iter(variant.by_format()), "bf16"))  # a tied head has no weights of its own
        products[dtype] = products.get(dtype, 0) + work
    used = {name: None for call in entry.calls for name in call.parameters}
    size = sum(_read(program.parameters[name], spec, tokens) for name in used)
    states = {name for call in entry.calls for name in call.states}
    for state in served.plan.states:
        if state.name in states and state.kind == "kv":
            size += batch * (context + entry.tokens) * (state.bytes // served.plan.max_seq_len)
        elif state.name in states:
            size += 2 * batch * state.bytes
    most = max(products, key=lambda dtype: products[dtype])
    return EntryCost(entry.name, batch, entry.tokens, context, flops, size, most)


def _read(parameter: Parameter, spec: Spec, tokens: int) -> int:
    """Return the bytes that `tokens` read of a weight: of experts those that are chosen, of the embedding rows."""
    size = parameter.type.bytes
    if parameter.role == "embedding" and not spec.model.tie_word_embeddings:
        return min(size, tokens * spec.model.hidden_size * size // parameter.type.elements)
    return read_by(tokens, parameter, spec, size)


def _dtype(format_: str) -> DType:
    return {"nvfp4": DType.F4E2M1, "fp8": DType.F8E4M3}.get(format_, DType.BF16)
