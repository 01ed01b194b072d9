"""Quantizing a checkpoint: the spec and its formats, the scales of activations, then the packing."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from n3c.backends.progress import SILENT, Progress
from n3c.compiler.common_options import SET
from n3c.runtime.options import Argument, Needs, Option, checked, size_of, usage_error
from n3c.specs.files import require_folder_name, require_new
from n3c.specs.schema import Spec

from .request import CalibrationData, QuantizeRequest

if TYPE_CHECKING:
    from .driver import Quantized

DEFAULT_BITS = 4.8
"""AutoQuantize's own default."""
AUTO, CALIBRATION = Needs("auto"), Needs("calibration")


@checked
def quantize(
    spec: Annotated[Path | str | Spec | None, Argument("[SPEC]")] = None,
    *,
    weights: Annotated[Path | str, Option("Checkpoint directory or hub id to quantize.", metavar="DIR")],
    output: Annotated[Path | str, Option("Output directory; must be new.", short="-o", metavar="DIR")],
    fmt: Annotated[
        str | None, Option("Format of every linear that no rule names: nvfp4, w4a16_nvfp4, fp8 or bf16.")
    ] = None,
    block: Annotated[str | None, Option("Weight blocks of NVFP4: 1x16 or 16x16.")] = None,
    search: Annotated[
        Literal["none", "mse"],
        Option("Block scales: nearest (none), or the neighbour with the least squared error (mse)."),
    ] = "none",
    multimodal: Annotated[
        Literal["text", "whole"],
        Option(
            "Of a multimodal checkpoint: the text model alone (text), or vision and audio as they are, too (whole)."
        ),
    ] = "text",
    resume: Annotated[bool, Option("Continue an interrupted run, or join finished parts.")] = False,
    part: Annotated[
        str | tuple[int, int],
        Option("Make only every N-th shard, from the I-th; join with --resume.", metavar="I/N"),
    ] = "1/1",
    max_shard_size: Annotated[int | str, Option("Most bytes of a file.", metavar="SIZE")] = "5GB",
    like: Annotated[
        Path | str | None, Option("Take the formats of this released checkpoint (directory or config file).")
    ] = None,
    auto: Annotated[bool, Option("Choose the formats: the least harm within --effective-bits.")] = False,
    effective_bits: Annotated[
        float,
        Option("Most bits a weight of --auto, over the linears it may quantize.", above=0, most=16, needs=AUTO),
    ] = DEFAULT_BITS,
    auto_mtp: Annotated[bool, Option("Let --auto quantize the MTP block too.", needs=AUTO)] = False,
    calibration: Annotated[
        Path | str | None,
        Option("Tokens, text, JSON lines, Parquet, Arrow, a folder or a mixture, as train.py's data."),
    ] = None,
    calibration_samples: Annotated[int, Option("Sequences to take of it.", least=1, needs=CALIBRATION)] = 128,
    calibration_length: Annotated[int, Option("Tokens of a sequence.", least=2, needs=CALIBRATION)] = 512,
    tokenizer: Annotated[
        Path | str | None, Option("Folder of tokenizer.json, for text; by default --weights.", needs=CALIBRATION)
    ] = None,
    data_format: Annotated[
        Literal["auto", "tokens", "jsonl", "parquet", "arrow", "text", "bytes"],
        Option("Of --calibration, where its name does not say it.", needs=CALIBRATION),
    ] = "auto",
    text_field: Annotated[
        str, Option("Field of JSON lines, Parquet and Arrow that is read.", needs=CALIBRATION)
    ] = "text",
    messages_field: Annotated[
        str | None, Option("Field of conversations, which the chat template writes.", needs=CALIBRATION)
    ] = None,
    dtype: Annotated[
        Literal["uint8", "uint16", "uint32", "int32", "int64"] | None,
        Option("Type of a .bin; by default of the vocabulary.", needs=CALIBRATION),
    ] = None,
    activation_scales: Annotated[
        Path | str | None, Option("Reuse activation scales: a file (.json or .safetensors), or a quantized checkpoint.")
    ] = None,
    save_activation_scales: Annotated[
        Path | str | None, Option("Save the calibrated scales (.json or .safetensors).", needs=CALIBRATION)
    ] = None,
    write_spec: Annotated[Path | str | None, Option("Write the spec with its final rules.")] = None,
    force: Annotated[bool, Option("Overwrite the files of --write-spec and --save-activation-scales.")] = False,
    set: Annotated[Sequence[str], SET] = (),
    progress: Progress = SILENT,
) -> "Quantized":
    """Quantize a checkpoint to ModelOpt's layout; without `spec` it is read from the checkpoint's config.

    N3CError: exit code 2 for arguments that do not go together, 3 for the spec and where a rule does not fit the
    model, 6 for checkpoint and output; there is no output then.
    """
    spec = Path(spec) if isinstance(spec, str) else spec
    if like is not None and auto:
        raise usage_error("--like and --auto both say the formats")
    if calibration is not None and activation_scales is not None and not auto:
        raise usage_error("--activation-scales replaces --calibration")
    if like is not None and fmt is not None:
        raise usage_error("--fmt has no effect: --like gives all formats")
    if force and write_spec is None and save_activation_scales is None:
        raise usage_error("--force has no effect: it needs --write-spec or --save-activation-scales")
    require_folder_name(Path(output))
    read = [Path(place) for place in (spec, weights, like, calibration, activation_scales)
            if isinstance(place, (Path, str))]  # fmt: skip
    for file in (write_spec, save_activation_scales):
        if file is not None:
            require_new(Path(file), *read, force=force)
    from n3c.backends.safetensors.locate import checkpoint_directory, require_outside  # loads numpy; help needs none

    data = None
    if calibration is not None:
        data = CalibrationData(
            path=Path(calibration),
            calibration_samples=calibration_samples,
            calibration_length=calibration_length,
            tokenizer=_path(tokenizer),
            data_format=data_format,
            text_field=text_field,
            messages_field=messages_field or "",
            dtype=dtype or "",
        )
    source = checkpoint_directory(weights)
    require_outside(Path(output), [source, *read])
    request = QuantizeRequest(
        weights=source,
        out=Path(output),
        spec=spec,
        overrides=tuple(set),
        fmt=fmt,
        block=block,
        like=None if like is None else checkpoint_directory(like),
        effective_bits=effective_bits if auto else None,
        mtp=auto_mtp,
        write_spec=_path(write_spec),
        calibration=data,
        activation_scales=None if activation_scales is None else checkpoint_directory(activation_scales),
        save_activation_scales=_path(save_activation_scales),
        search=search,
        multimodal=multimodal,
        resume=resume,
        part=part_of(part),
        max_shard_bytes=size_of("--max-shard-size", max_shard_size),
    )
    from .driver import run

    return run(request, progress)


def _path(path: Path | str | None) -> Path | None:
    return None if path is None else Path(path)


def part_of(text: str | tuple[int, int]) -> tuple[int, int]:
    """Return (I, N) of `I/N`; N3CError (exit code 2) unless 1 ≤ I ≤ N."""
    found = re.fullmatch(r"(\d{1,5})/(\d{1,5})", text if isinstance(text, str) else "/".join(map(str, text)))
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise usage_error(f"--part: {text!r} is not I/N with 1 ≤ I ≤ N")
    return int(found[1]), int(found[2])
