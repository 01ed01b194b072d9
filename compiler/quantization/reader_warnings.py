"""Warnings about a quantized checkpoint that vLLM, SGLang and TensorRT do not give themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from n3c.backends.safetensors.layout import KEEP, Weight
from n3c.ir.diagnostics import Diagnostic, Severity, Span
from n3c.ir.formats import FORMATS


def reader_warnings(weights: Sequence[Weight], out: Path) -> list[Diagnostic]:
    """Return the warnings about `weights`, which were written to `out`."""
    place = Span(str(out))
    return [*_uncalibrated(weights, place), *_disagreeing(weights, place)]


def _uncalibrated(weights: Sequence[Weight], place: Span) -> list[Diagnostic]:
    """Return warnings about what lacks a scale of its activations."""
    lacking = Counter(
        FORMATS[weight.format].blocked for weight in weights if weight.format != KEEP and not weight.calibrated
    )
    found: list[Diagnostic] = []
    if lacking[True]:
        message = f"{lacking[True]} NVFP4 linears have no input_scale: the checkpoint says W4A16_NVFP4 of them"
        help_ = "--calibration or --activation-scales gives them"
        found.append(Diagnostic("W0621", message, place, Severity.WARNING, help_))
    if lacking[False]:
        message = (
            f"{lacking[False]} FP8 linears have no input_scale: vLLM and SGLang load them without a word and compute"
            " nonsense, as they only know FP8 with a static scale of the input"
        )
        help_ = "give --calibration or --activation-scales, or their rules another format (bf16, w4a16_nvfp4)"
        found.append(Diagnostic("W0621", message, place, Severity.WARNING, help_))
    return found


def _disagreeing(weights: Sequence[Weight], place: Span) -> list[Diagnostic]:
    """Return a warning about linears of different formats that readers merge into one."""
    merged: dict[str, set[str]] = {}
    for weight in weights:
        parent, _, name = weight.module.rpartition(".")
        if name in ("q_proj", "k_proj", "v_proj"):
            merged.setdefault(f"{parent}.{{q,k,v}}_proj", set()).add(weight.format)
        elif parent.rpartition(".")[0].endswith(".experts"):
            merged.setdefault(parent.rpartition(".")[0], set()).add(weight.format)
    wrong = [name for name, formats in merged.items() if len(formats) > 1]
    if not wrong:
        return []
    message = f"`{wrong[0]}` has linears of different formats" + (f", and {len(wrong) - 1} more" * (len(wrong) > 1))
    help_ = "n3c reads them; vLLM and SGLang merge q, k and v, and all experts of a layer, and need one format for each"
    return [Diagnostic("W0623", message, place, Severity.WARNING, help_)]
