"""The check that a checkpoint fits a spec: names, shapes and formats of tensors, and its config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError, Span
from n3c.passes.lower.model import lower
from n3c.passes.pipelines import quantize_pass
from n3c.specs.blocks import MOE
from n3c.specs.convert import run_import
from n3c.specs.layer_tables import moe_tables
from n3c.specs.pattern import Pattern
from n3c.specs.reader import spec_fields
from n3c.specs.schema import Spec

from .checkpoint import Checkpoint
from .misfits import misfits, other_formats, quantized_weights

NOT_COMPARED = {
    "name": "a title",
    "schema": "the version of the spec's form",
    "quantization": "the formats of the tensors themselves are compared",
    "training": "how weights were trained does not change what they compute",
    "serving": "limits and types of the engine, not of the weights",
    "model.max_position_embeddings": "attention has no position encoding: a limit that the user sets",
    "model.initializer_range": "of fresh weights",
    "model.rescale_prenorm_residual": "of fresh weights",
    "model.pad_token_id": "tokens are the user's input",
    "model.bos_token_id": "tokens are the user's input",
    "model.eos_token_ids": "where generation ends, not what is computed",
    "mamba.chunk_size": "the order of the same sums",
    "mamba.time_step_min": "of fresh weights",
    "mamba.time_step_max": "of fresh weights",
    "mamba.time_step_floor": "of fresh weights",
    "mtp.depth": "how often one set of weights is applied; generation drafts as many tokens as it likes",
    "mtp.loss_scaling_factor": "of the training loss",
}
"""Keys of a spec in which a checkpoint may differ, and why; every other key is compared."""

_MOST_FAULTS = 20


def fitting_checkpoint(spec: Spec, directory: Path, *, unquantized: bool = False) -> Checkpoint:
    """Open the checkpoint in `directory`; N3CError (exit code 6) with all that does not fit `spec`.

    Weights are stored in the formats of `spec` or not quantized yet; with `unquantized` none may be. Only headers
    and config.json are read.
    """
    checkpoint = Checkpoint(directory)
    require_fit(spec, checkpoint, unquantized=unquantized)
    if (directory / "config.json").is_file():
        _raise(_other_values(spec, directory), checkpoint)
    return checkpoint


def require_fit(spec: Spec, checkpoint: Checkpoint, *, unquantized: bool = False) -> None:
    """Raise N3CError (exit code 6) with all tensors that do not fit `spec`, wherever they come from."""
    program = lower(spec)
    parameters = list(program.parameters.values())
    _raise(misfits(spec, parameters, checkpoint), checkpoint)
    if unquantized:
        _raise(quantized_weights(parameters, checkpoint), checkpoint)
    else:
        quantize_pass(spec).run(program)
        _raise(other_formats(program.parameters.values(), checkpoint), checkpoint)


def _other_values(spec: Spec, directory: Path) -> Iterator[Diagnostic]:
    """Compare what config.json says with the spec."""
    place = Span(str(directory / "config.json"))
    try:
        theirs = run_import(directory, formats_matter=False).spec
    except N3CError as error:
        raise N3CError(error.diagnostics, ExitCode.FILE) from error
    help_ = "use the spec of this checkpoint (`n3c import DIR`)"
    for key, wanted, found in differences(spec, theirs):
        yield Diagnostic("E0809", f"the checkpoint's config says {key} = {found}, the spec {wanted}", place, help=help_)


def differences(ours: Spec, theirs: Spec) -> Iterator[tuple[str, object, object]]:
    """Yield key, our value and theirs of all keys that decide what a model computes.

    Tables that only one of them has show in the tensors. [moe] is compared block by block: how its entries say what
    the blocks have does not matter.
    """
    names = [name for name in spec_fields() if name not in NOT_COMPARED]
    told: set[str] = set()
    for name in names:
        for mine, other in zip(_tables(ours, name), _tables(theirs, name), strict=False):
            for field in dataclasses.fields(mine):
                key = f"{name}.{field.name}"
                one, two = (_computed(getattr(side, field.name)) for side in (mine, other))
                if key not in NOT_COMPARED and key not in told and one != two:
                    told.add(key)
                    yield key, one, two


def _tables(spec: Spec, name: str) -> tuple[Any, ...]:
    """Return a table of the spec, none where it lacks it, and one for each MoE block."""
    if name == MOE.table:
        return moe_tables(spec)
    table = spec.section(name)
    return (table,) if dataclasses.is_dataclass(table) else ()


def _computed(value: object) -> object:
    """Return what matters of a value: of a pattern the blocks, not the pipeline cuts."""
    return value.symbols if isinstance(value, Pattern) else value


def _raise(faults: Iterable[Diagnostic], checkpoint: Checkpoint) -> None:
    found = list(faults)
    if found:
        shown, rest = found[:_MOST_FAULTS], len(found) - _MOST_FAULTS
        if rest > 0:
            shown.append(Diagnostic(found[0].code, f"and {rest} more", Span(str(checkpoint.directory))))
        raise N3CError(shown, ExitCode.FILE)
