"""Scales of activations: from calibrated magnitudes, to files, from files, and as the checkpoint has them.

A file holds one number for each name, as JSON or safetensors:

    <module>.input_amax       largest magnitude of what the linear reads; `….experts.*.up_proj` for all experts
    <module>.output_amax      largest magnitude of what k_proj or v_proj gives to the KV cache
    <module>.input_scale      amax / 2688 (NVFP4) or amax / 448 (FP8), as ModelOpt's checkpoints have it
    <k_proj>.k_scale, <v_proj>.v_scale      amax / 448

The first two hold for any choice of formats and are what n3c writes. Of a quantized checkpoint's directory its own
scales are taken; where a linear gets another format than it has there, by the magnitude that they mean.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np

from n3c.backends.safetensors.checkpoint import DTYPES, Checkpoint
from n3c.backends.safetensors.header import CODES, HeaderError, read_header
from n3c.compiler.quantization.units import find_linears
from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError, Span, counted
from n3c.ir.formats import CACHE_SCALES, E4M3_MAX, FORMATS, FP8, INPUT_SCALE, NVFP4, WeightFormat
from n3c.ir.json_file import JsonError, parse_json
from n3c.ir.program import LedgerEntry
from n3c.passes.lower.model import lower
from n3c.passes.pipelines import quantize_pass
from n3c.specs.files import read_text, write_text
from n3c.specs.places import shown
from n3c.specs.schema import Spec

from .calibrate import Amax

_KINDS = ("input_amax", "output_amax", *(suffix.removeprefix(".") for suffix in (INPUT_SCALE, *CACHE_SCALES)))
_EXPERT = re.compile(r"\.experts\.\d+\.")
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True)
class Scales:
    """Scales as the checkpoint stores them."""

    inputs: Mapping[str, float] = field(default_factory=dict[str, float])
    """Module, one for each expert too → `input_scale`."""
    cache: Mapping[str, float] = field(default_factory=dict[str, float])
    """Tensor, as `….k_proj.k_scale` → value."""


def entries_of(amax: Amax) -> dict[str, float]:
    """Return calibrated magnitudes under the names of a file."""
    inputs = {f"{module}.input_amax": value for module, value in sorted(amax.inputs.items())}
    return inputs | {f"{module}.output_amax": value for module, value in sorted(amax.cache.items())}


def save_scales(path: Path, entries: Mapping[str, float]) -> None:
    """Write a file of scales, safetensors where its name ends so, else JSON; N3CError (exit code 6) where it fails."""
    if path.suffix != ".safetensors":
        write_text(path, json.dumps(dict(entries), indent=1) + "\n")
        return
    from safetensors.numpy import save_file

    try:
        save_file({name: np.array(value, np.float32) for name, value in entries.items()}, path)
    except Exception as error:
        raise _fault("E0602", f"cannot write the scales: {error}", path) from error


def load_scales(path: Path, spec: Spec) -> dict[str, float]:
    """Read a file of scales, or those of a checkpoint directory.

    N3CError (exit code 6) for names that the model lacks and values that are no scales.
    """
    if path.is_dir():
        raw = _read_checkpoint(path, spec)
    else:
        raw = _read_safetensors(path) if path.suffix == ".safetensors" else _read_json(path)
    known = {module for linear in find_linears(spec) for module in (linear.module, *_experts(linear.module, spec))}
    strange = [name for name in raw if not _is_named(name, known)]
    bad = [name for name, value in raw.items() if _is_named(name, known) and not _is_scale(value)]
    values = [f"`{shown(name)}` is {shown(str(raw[name]))}" for name in bad]
    place = Span(str(path))
    faults = [
        *counted("E0632", "{} is no scale of this model", "{} names are no scales of it", _quoted(strange), place),
        *counted("E0633", "{}", "{} values are no scales", values, place),
    ]
    if faults:
        raise N3CError(faults, ExitCode.FILE)
    return {name: float(cast("float", value)) for name, value in raw.items()}


def _quoted(names: Sequence[str]) -> list[str]:
    return [f"`{shown(name)}`" for name in names]


def _is_named(name: str, known: Container[str]) -> bool:
    module, _, kind = name.rpartition(".")
    return kind in _KINDS and module in known


def resolve(spec: Spec, entries: Mapping[str, float], path: Path | None = None) -> Scales:
    """Return the scales that the quantized checkpoint of `spec` needs.

    Every NVFP4 and FP8 linear gets an input scale, and with an FP8 cache every k_proj and v_proj
    theirs. Raises N3CError (exit code 6) for those that `entries` lacks; `path` is where they are from.
    """
    inputs: dict[str, float] = {}
    cache: dict[str, float] = {}
    missing: list[str] = []
    for entry in ledger(spec):
        module = entry.name.removesuffix(".weight")
        divisor = FORMATS[entry.format].input_divisor if entry.format in FORMATS else None
        if divisor is not None:
            for name in (*_experts(module, spec),) or (module,):
                scale = _input_scale(name, module, entries, divisor)
                if scale is None:
                    missing.append(f"{name}.input_amax")
                else:
                    inputs[name] = scale
        half = module.rpartition(".")[2]
        cached = not module.startswith("mtp.") or f"{module}.output_amax" in entries
        if spec.serving.kv_cache_dtype == "fp8" and half in ("k_proj", "v_proj") and cached:
            name = f"{module}.{half[0]}_scale"
            amax = entries.get(f"{module}.output_amax")
            if name not in entries and amax is None:
                missing.append(f"{module}.output_amax")
            else:
                cache[name] = entries[name] if amax is None else _scale(amax, E4M3_MAX)
    if missing:
        place = path or Path("calibration")
        one, many = "no scale {}", "{} scales are missing"
        raise N3CError([*counted("E0634", one, many, _quoted(missing), Span(str(place)))], ExitCode.FILE)
    return Scales(inputs, cache)


def ledger(spec: Spec) -> tuple[LedgerEntry, ...]:
    """Return the format of every weight of a spec."""
    program = lower(spec)
    quantize_pass(spec).run(program)
    return program.ledger


def _input_scale(name: str, module: str, entries: Mapping[str, float], divisor: float) -> float | None:
    for candidate in (name, module):
        if candidate + INPUT_SCALE in entries:
            return entries[candidate + INPUT_SCALE]
        if f"{candidate}.input_amax" in entries:
            return _scale(entries[f"{candidate}.input_amax"], divisor)
    return None


def _scale(amax: float, divisor: float) -> float:
    """Divide in float32, as ModelOpt does; an input that was always 0, or as good as, gets 1."""
    scale = float(np.float32(amax) / np.float32(divisor))
    return scale if scale > 0 else 1.0


def _experts(module: str, spec: Spec) -> Iterator[str]:
    if ".experts.*." in module and spec.moe is not None:
        for expert in range(spec.moe.num_experts):
            yield module.replace("*", str(expert))


def _is_scale(value: object) -> bool:
    """Whether `value` is a number that float32 holds, and not negative."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= _LARGEST


def _read_json(path: Path) -> dict[str, object]:
    try:
        raw = parse_json(read_text(path).encode())
    except JsonError as error:
        raise _fault("E0632", f"not readable: {error}", path) from None
    if not isinstance(raw, dict):
        raise _fault("E0632", "not a JSON object of names and numbers", path)
    return cast("dict[str, object]", raw)


def _read_safetensors(path: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    try:
        tensors = read_header(path)
        with path.open("rb") as file:
            for name, info in tensors.items():
                if info.dtype not in DTYPES or math.prod(info.shape) != 1:
                    found[name] = f"{info.dtype} {list(info.shape)}"  # no number, whatever it holds
                    continue
                file.seek(info.offset)
                found[name] = float(np.frombuffer(file.read(info.bytes), DTYPES[info.dtype])[0])
    except (OSError, HeaderError) as error:
        raise _fault("E0609", f"not a readable safetensors file of scales: {error}", path) from None
    return found


def _read_checkpoint(path: Path, spec: Spec) -> dict[str, object]:
    """Return the scales of a quantized checkpoint under the names of a file; N3CError where it has none."""
    checkpoint = Checkpoint(path)
    wanted = {entry.name.removesuffix(".weight"): entry.format for entry in ledger(spec)}
    found: dict[str, object] = {}
    for name in checkpoint:
        if name.endswith((INPUT_SCALE, *CACHE_SCALES)) and (spec.mtp is not None or not name.startswith("mtp.")):
            scale = checkpoint.read(name)
            found[name] = float(scale.reshape(-1)[0]) if scale.size == 1 else f"{list(scale.shape)}"
    for name in [name for name in found if name.endswith(INPUT_SCALE)]:
        module = name.removesuffix(INPUT_SCALE)
        held = _stored_format(f"{module}.weight", checkpoint)
        asked = FORMATS.get(wanted.get(_EXPERT.sub(".experts.*.", module), ""))
        value = found[name]
        if held is None or asked is None or asked.input_divisor == held.input_divisor or not isinstance(value, float):
            continue
        del found[name]
        found[f"{module}.input_amax"] = value * (held.input_divisor or 1.0)
    if not found:
        raise _fault("E0632", "the checkpoint holds no input_scale, k_scale or v_scale", path)
    return found


def _stored_format(weight: str, checkpoint: Checkpoint) -> WeightFormat | None:
    """Return the format of a weight by the type of its codes; None for one that is not quantized."""
    held = checkpoint.info(weight)[0] if weight in checkpoint else ""
    return next((format_ for format_ in (NVFP4, FP8) if CODES[format_.name] == held), None)


def _fault(code: str, message: str, path: Path) -> N3CError:
    return N3CError(Diagnostic(code, message, Span(str(path))), ExitCode.FILE)
