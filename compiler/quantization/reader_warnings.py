"""Warnings about a quantized checkpoint that its readers do not give themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from n3c.backends.modelopt.layout import algorithm, is_quantized
from n3c.backends.safetensors.header import TensorInfo
from n3c.backends.safetensors.layout import KEEP, Weight
from n3c.compiler.quantization.calibration.activation_scales import Scales
from n3c.ir.diagnostics import Diagnostic, Severity, Span
from n3c.ir.formats import E4M3_MAX, FORMATS, FP8, NVFP4, W4A16_NVFP4
from n3c.ir.json_file import LFS_POINTER, is_lfs_file

_LLAMA_CPP_BLOCK = 64
"""Weights along K that llama.cpp packs together."""


def reader_warnings(weights: Sequence[Weight], scales: Scales, out: Path, *, fp8_cache: bool) -> list[Diagnostic]:
    """Return the warnings about `weights`, which were written to `out`.

    `scales` are those that were measured; `fp8_cache`: the spec serves with an FP8 cache.
    """
    place = Span(str(out))
    if not is_quantized(weights):
        message = "nothing is quantized: config.json has no quantization_config, and there is no hf_quant_config.json"
        help_ = "--fmt, or the spec's [quantization], gives linears another format than bf16"
        return [Diagnostic("W0624", message, place, Severity.NOTE, help_)]
    found = [*_uncalibrated(weights, scales.inputs, place)]
    if fp8_cache and not scales.cache:
        message = "the FP8 cache has no measured scales: the checkpoint does not announce it, as readers differ on that"
        help_ = "--calibration or --activation-scales gives them; or choose the type of the cache when serving"
        found.append(Diagnostic("W0621", message, place, Severity.WARNING, help_))
    return [*found, *_disagreeing(weights, place), *run_otherwise(weights, out)]


def other_models_note(others: Collection[TensorInfo], *, whole: bool, out: Path) -> list[Diagnostic]:
    """Return the note about the tensors of a multimodal checkpoint that are not those of its text model."""
    if not others:
        return []
    what = f"{len(others):,} tensors of other models ({sum(info.bytes for info in others):,} bytes)"
    if whole:
        return [Diagnostic("W0625", f"{what} are carried byte for byte", Span(str(out)), Severity.NOTE)]
    help_ = "--multimodal whole carries them"
    return [Diagnostic("W0625", f"{what} are left out", Span(str(out)), Severity.NOTE, help_)]


def left_out_files(files: Sequence[Path]) -> list[Diagnostic]:
    """Return a warning for each small file of a checkpoint that is not the file itself."""
    return [
        Diagnostic("W0626", f"`{path.name}` is {LFS_POINTER}: it is left out", Span(str(path)), Severity.WARNING)
        for path in files
        if is_lfs_file(path)
    ]


def _uncalibrated(weights: Sequence[Weight], inputs: Mapping[str, float], place: Span) -> list[Diagnostic]:
    """Return warnings about what lacks a measured scale of its activations."""
    lacking = Counter(
        FORMATS[weight.format].blocked for weight in weights if weight.format != KEEP and weight.module not in inputs
    )
    found: list[Diagnostic] = []
    if lacking[True] and not inputs:  # with scales, a linear without one was to be weight-only
        message = f"{lacking[True]} NVFP4 linears have no input_scale: the checkpoint says W4A16_NVFP4 of them"
        help_ = "--calibration or --activation-scales gives them"
        found.append(Diagnostic("W0621", message, place, Severity.WARNING, help_))
    if lacking[False]:
        message = (
            f"{lacking[False]} FP8 linears have no measured input_scale, which readers cannot do without: they get"
            f" {FP8.uncalibrated_scale:g}, by which inputs are rounded to E4M3 as they are, at most {E4M3_MAX:g}"
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


def run_otherwise(weights: Sequence[Weight], out: Path) -> list[Diagnostic]:
    """Return notes about linears that a reader refuses, or runs otherwise than they are stored for.

    Each was found by running the reader (docs/readers.md has its version); what is written cannot avoid it.
    """
    found: list[tuple[str, str]] = []
    stored = {weight.name: chosen for weight in weights if (chosen := algorithm(weight)) is not None}
    of_role: dict[str, set[str]] = {}
    for weight in weights:
        if weight.name in stored:
            of_role.setdefault(weight.role, set()).add(stored[weight.name])
    experts = {chosen for role, formats in of_role.items() if ".experts." in role for chosen in formats}
    mtp = {chosen for role, formats in of_role.items() if role.startswith("mtp.") for chosen in formats}
    fp4 = {NVFP4.modelopt, W4A16_NVFP4.modelopt}
    if W4A16_NVFP4.modelopt in experts:
        message = "SGLang rounds what W4A16_NVFP4 experts read to NVFP4, with a scale of 1"
        found.append((message, "run it with --moe-runner-backend marlin; or give --calibration, for a measured scale"))
        if len(set(stored.values())) > 1:
            message = "llama.cpp may round what W4A16_NVFP4 experts read to 4 bits, as other linears have other formats"
            found.append((message, "give all that is quantized w4a16_nvfp4, or give --calibration"))
    if W4A16_NVFP4.modelopt in of_role.get("mamba.in_proj", ()):
        message = "SGLang leaves four of the five scales that it has for a W4A16_NVFP4 `in_proj` of Mamba unset"
        found.append((message, 'for SGLang give roles = ["mamba.in_proj"] another format'))
    if FP8.modelopt in experts:
        found.append(("TensorRT Edge-LLM refuses experts in FP8", "for Edge-LLM give them nvfp4 or w4a16_nvfp4"))
    if mtp:
        message = "TensorRT Edge-LLM takes the codes of a quantized MTP block for its weights, without a word"
        if mtp & fp4:
            message += "; llama.cpp's converter refuses it without --no-mtp"
        found.append((message, 'for these readers give roles = ["mtp.*"] the format bf16'))
    odd = [weight for weight in weights if stored.get(weight.name) in fp4 and weight.shape[-1] % _LLAMA_CPP_BLOCK]
    if odd:
        message = f"llama.cpp's converter refuses NVFP4 of {odd[0].shape[-1]} inputs, as `{odd[0].module}` has:"
        found.append(
            (f"{message} it packs {_LLAMA_CPP_BLOCK} together", "for llama.cpp give these linears fp8 or bf16")
        )
    return [Diagnostic("W0628", message, Span(str(out)), Severity.NOTE, help_) for message, help_ in found]
