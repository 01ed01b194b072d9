"""The check that a checkpoint fits a spec: names, shapes and formats of tensors, and its config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path

from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError, Span
from n3c.ir.formats import CACHE_SCALES, FORMATS, INPUT_SCALE
from n3c.ir.program import Parameter
from n3c.ir.source import Fp8, Nvfp4, Stack, tensor_names
from n3c.ir.types import DType, TensorType
from n3c.passes.lower.model import lower
from n3c.passes.pipelines import quantize_pass
from n3c.specs.convert import run_import
from n3c.specs.pattern import Pattern
from n3c.specs.schema import Spec

from .checkpoint import Checkpoint
from .header import CODES, stored_as

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
    checkpoint, program = Checkpoint(directory), lower(spec)
    parameters = list(program.parameters.values())
    _raise(_misfits(parameters, checkpoint), checkpoint)
    if unquantized:
        _raise(_quantized(parameters, checkpoint), checkpoint)
    else:
        quantize_pass(spec).run(program)
        _raise(_other_formats(program.parameters.values(), checkpoint), checkpoint)
    if (directory / "config.json").is_file():
        _raise(_other_values(spec, directory), checkpoint)
    return checkpoint


def _misfits(parameters: Iterable[Parameter], checkpoint: Checkpoint) -> Iterator[Diagnostic]:
    """Compare names and shapes with the headers; `parameters` are those of the program before quantization."""
    place = Span(str(checkpoint.directory))
    wanted: set[str] = set()
    for parameter in parameters:
        shape = parameter.type.static_dims[1 if isinstance(parameter.source, Stack) else 0 :]
        for name in tensor_names(parameter.source):
            wanted.add(name)
            if name not in checkpoint:
                yield Diagnostic("E0603", f"no tensor `{name}` in the checkpoint", place)
                continue
            dtype, found = checkpoint.info(name)
            packed = dtype == CODES["nvfp4"]
            expected = stored_as(TensorType(DType.F4E2M1, shape))[1] if packed else shape
            if found != expected:
                yield Diagnostic("E0606", f"tensor `{name}` is {list(found)}, the spec needs {list(expected)}", place)
    scales = (*(part.suffix for f in FORMATS.values() for part in f.scales), INPUT_SCALE, *CACHE_SCALES)
    # released checkpoints may carry an MTP block that a spec leaves out, as transformers does
    unwanted = () if any(name.startswith("mtp.") for name in wanted) else ("mtp.",)
    for name in checkpoint:
        if name not in wanted and not name.endswith(scales) and not name.startswith(unwanted):
            yield Diagnostic("E0608", f"the spec has no place for tensor `{name}`", place)


def _quantized(parameters: Iterable[Parameter], checkpoint: Checkpoint) -> Iterator[Diagnostic]:
    """Find weights that are quantized already."""
    for parameter in parameters:
        for name in tensor_names(parameter.source):
            dtype = checkpoint.info(name)[0]
            if len(parameter.type.dims) > 1 and dtype not in ("BF16", "F32", "F16"):
                message, place = f"tensor `{name}` is {dtype}, not BF16 or FP32", Span(str(checkpoint.file(name)))
                yield Diagnostic("E0605", message, place, help="quantize the unquantized checkpoint")


def _other_formats(parameters: Iterable[Parameter], checkpoint: Checkpoint) -> Iterator[Diagnostic]:
    """Compare the formats of a checkpoint with those that the spec asks for.

    `parameters` are those of the program after the pass `quantize`. A weight that is not quantized in the
    checkpoint fits every format: it is quantized when it is read. One that is, is taken as it is.
    """
    place = Span(str(checkpoint.directory))
    for parameter in parameters:
        source = parameter.source
        if isinstance(source, (Nvfp4, Fp8)) and source.part != "codes":
            continue
        asked = FORMATS[parameter.format]
        for name in tensor_names(source):
            held = checkpoint.info(name)[0]
            stored = next((f for f in FORMATS.values() if f.quantized and CODES[f.name] == held), None)
            if stored is None:
                continue
            if CODES[asked.name] != held:
                title = "NVFP4" if stored.blocked else "FP8"
                message = f"tensor `{name}` is stored as {title}, the spec asks for {asked.name}"
                file = Span(str(checkpoint.file(name)))
                yield Diagnostic("E0619", message, file, help="build with the spec of that checkpoint")
                continue
            for missing in asked.part_names(name).values():
                if missing not in checkpoint:
                    yield Diagnostic("E0603", f"no tensor `{missing}` in the checkpoint", place)


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

    Tables that only one of them has show in the tensors.
    """
    for table in dataclasses.fields(Spec):
        mine, other = getattr(ours, table.name), getattr(theirs, table.name)
        if table.name in NOT_COMPARED or not dataclasses.is_dataclass(mine) or other is None:
            continue
        for field in dataclasses.fields(mine):
            key = f"{table.name}.{field.name}"
            one, two = (_computed(getattr(side, field.name)) for side in (mine, other))
            if key not in NOT_COMPARED and one != two:
                yield key, one, two


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
