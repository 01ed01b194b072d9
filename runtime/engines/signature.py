"""The signature of an entry point, from its program."""

from __future__ import annotations

from n3c.ir.program import EntryPoint, Program

from .interface import Port, Signature


def signature_of(program: Program, entry: EntryPoint, batch: int) -> Signature:
    """Return what an entry point takes and gives for `batch` sequences, besides states and weights."""
    dims = {"B": batch, "S": entry.tokens}
    types = dict(entry.inputs)
    for call in entry.calls:
        outputs = program.functions[call.function].outputs
        types.update((name, value.type) for name, value in zip(call.outputs, outputs, strict=True))

    def port(name: str) -> Port:
        bound = types[name].bind(dims)
        return Port(bound.dtype.value, bound.dims)

    return Signature({name: port(name) for name in entry.inputs}, {name: port(name) for name in entry.outputs})
