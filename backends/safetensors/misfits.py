"""Tensors of a checkpoint that do not fit a spec: names, shapes, formats. Equal faults are told together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from n3c.ir.diagnostics import Diagnostic, Span, counted
from n3c.ir.formats import CACHE_SCALES, FORMATS, INPUT_SCALE
from n3c.ir.program import Parameter
from n3c.ir.source import Fp8, Nvfp4, Stack, tensor_names
from n3c.ir.types import DType, TensorType
from n3c.specs.schema import Spec
from n3c.specs.spellings import LANGUAGE_MODEL, WRAPPERS

from .checkpoint import Checkpoint
from .header import CODES, stored_as

_MOST_PREFIXES = 6
_BAND = 16 << 20
_MISSING = ("no tensor {} in the checkpoint", "{} tensors are not in the checkpoint")
HEAD, EMBEDDING = "lm_head.weight", "backbone.embeddings.weight"


def misfits(spec: Spec, parameters: Iterable[Parameter], checkpoint: Checkpoint) -> Iterator[Diagnostic]:
    """Compare names and shapes with the headers; `parameters` are those of the program before quantization."""
    place = Span(str(checkpoint.directory))
    wanted: set[str] = set()
    missing: list[str] = []
    misshapen: dict[tuple[tuple[int, ...], tuple[int, ...]], list[str]] = {}
    for parameter in parameters:
        shape = parameter.type.static_dims[1 if isinstance(parameter.source, Stack) else 0 :]
        for name in tensor_names(parameter.source):
            wanted.add(name)
            if name not in checkpoint:
                missing.append(name)
                continue
            dtype, found = checkpoint.info(name)
            packed = dtype == CODES["nvfp4"]
            expected = stored_as(TensorType(DType.F4E2M1, shape))[1] if packed else shape
            if found != expected:
                misshapen.setdefault((found, expected), []).append(name)
    scales = (*(part.suffix for f in FORMATS.values() for part in f.scales), INPUT_SCALE, *CACHE_SCALES)
    # released checkpoints may carry an MTP block that a spec leaves out, as transformers does
    unwanted = () if any(name.startswith("mtp.") for name in wanted) else ("mtp.",)
    strange = [
        name
        for name in checkpoint
        if name not in wanted and not name.endswith(scales) and not name.startswith(unwanted)
    ]
    if spec.model.tie_word_embeddings and HEAD in strange:
        strange.remove(HEAD)
        yield from _other_head(checkpoint)
    yield from _unknown_prefix(missing, strange, place)
    if missing and all(name.startswith("mtp.") for name in missing) and not _has_mtp(checkpoint):
        message = "the checkpoint has no `mtp.*` tensors, which transformers drops, but the spec has [mtp]"
        help_ = "remove [mtp] from the spec, as `n3c import DIR` does, or take the released checkpoint"
        yield Diagnostic("E0603", message, place, help=help_)
    else:
        yield from counted("E0603", *_MISSING, _quoted(missing), place)
    for (found, expected), names in misshapen.items():
        needs = f"{list(found)}, the spec needs {list(expected)}"
        yield from counted("E0606", f"tensor {{}} is {needs}", f"{{}} tensors are {needs}", _quoted(names), place)
    one, many = "the spec has no place for tensor {}", "the spec has no place for {} tensors"
    yield from counted("E0608", one, many, _quoted(strange), place, _help_for(strange))


def _quoted(names: Sequence[str]) -> list[str]:
    return [f"`{name}`" for name in names]


def _help_for(strange: Sequence[str]) -> str | None:
    if any(name.endswith("pre_quant_scale") for name in strange):
        return "the checkpoint was quantized by AWQ, which n3c does not compute: take the unquantized one"
    return None


def _unknown_prefix(missing: list[str], strange: list[str], place: Span) -> Iterator[Diagnostic]:
    """Take out of both lists what differs by a prefix alone, and tell it in one line."""
    wanted = set(missing)
    prefixed: dict[str, str] = {}
    for name in strange:
        parts = name.split(".")
        rests = (".".join(parts[start:]) for start in range(1, min(len(parts), _MOST_PREFIXES)))
        rest = next((rest for rest in rests if rest in wanted), None)
        if rest is not None:
            prefixed[name] = rest
    if not prefixed:
        return
    first, rest = next(iter(prefixed.items()))
    message = f"{len(prefixed):,} tensors have the prefix `{first.removesuffix(rest)}` before their names, as `{first}`"
    help_ = f"rename them; prefixes that n3c knows are model., {', '.join((*WRAPPERS, LANGUAGE_MODEL[-1]))}"
    yield Diagnostic("E0608", message, place, help=help_)
    found = set(prefixed.values())
    missing[:] = [name for name in missing if name not in found]
    strange[:] = [name for name in strange if name not in prefixed]


def _has_mtp(checkpoint: Checkpoint) -> bool:
    return any(name.startswith("mtp.") for name in checkpoint)


def _other_head(checkpoint: Checkpoint) -> Iterator[Diagnostic]:
    """Find a head that is stored beside the embedding that it is tied to, and differs."""
    same = EMBEDDING in checkpoint and checkpoint.info(HEAD) == checkpoint.info(EMBEDDING)
    size = checkpoint.bytes(HEAD)
    for start in range(0, size if same else 0, _BAND):
        length = min(_BAND, size - start)
        ours, theirs = (checkpoint.read_bytes(name, start, length) for name in (EMBEDDING, HEAD))
        if not np.array_equal(ours, theirs):
            same = False
            break
    if not same:
        message = f"`{HEAD}` is not `{EMBEDDING}`, though the spec ties them"
        help_ = "model.tie_word_embeddings = false, in the config, too"
        yield Diagnostic("E0608", message, Span(str(checkpoint.file(HEAD))), help=help_)


def quantized_weights(parameters: Iterable[Parameter], checkpoint: Checkpoint) -> Iterator[Diagnostic]:
    """Find weights that are quantized already."""
    found: dict[str, list[str]] = {}
    for parameter in parameters:
        for name in tensor_names(parameter.source):
            dtype = checkpoint.info(name)[0]
            if len(parameter.type.dims) > 1 and dtype not in ("BF16", "F32", "F16"):
                found.setdefault(dtype, []).append(name)
    for dtype, names in found.items():
        place = Span(str(checkpoint.file(names[0])))
        one, many = f"tensor {{}} is {dtype}, not BF16 or FP32", f"{{}} tensors are {dtype}, not BF16 or FP32"
        yield from counted("E0605", one, many, _quoted(names), place, "quantize the unquantized checkpoint")


def other_formats(parameters: Iterable[Parameter], checkpoint: Checkpoint) -> Iterator[Diagnostic]:
    """Compare the formats of a checkpoint with those that the spec asks for.

    `parameters` are those of the program after the pass `quantize`. A weight that is not quantized in the
    checkpoint fits every format: it is quantized when it is read. One that is, is taken as it is.
    """
    place = Span(str(checkpoint.directory))
    differing: dict[tuple[str, str], list[str]] = {}
    missing: list[str] = []
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
                differing.setdefault(("NVFP4" if stored.blocked else "FP8", asked.name), []).append(name)
            else:
                missing += [part for part in asked.part_names(name).values() if part not in checkpoint]
    for (title, asked_name), names in differing.items():
        stored_as_ = f"stored as {title}, the spec asks for {asked_name}"
        one, many = f"tensor {{}} is {stored_as_}", f"{{}} tensors are {stored_as_}"
        file = Span(str(checkpoint.file(names[0])))
        yield from counted("E0619", one, many, _quoted(names), file, "build with the spec of that checkpoint")
    yield from counted("E0603", *_MISSING, _quoted(missing), place)
