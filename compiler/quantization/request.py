"""A request to `n3c quantize`: the checkpoint, its formats, and how the result is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from n3c.specs.schema import BLOCKS, Format, Spec

if TYPE_CHECKING:
    from n3c.backends.safetensors.packing import Search

FORMATS: tuple[Format, ...] = get_args(Format)
SEARCHES = ("none", "mse")
BLOCK_NAMES = {f"{rows}x{columns}": (rows, columns) for rows, columns in BLOCKS}


@dataclass(frozen=True, slots=True)
class CalibrationData:
    """What calibration reads, and how. But for `path`, fields are named as options are, most of them train.py's."""

    path: Path
    calibration_samples: int = 128
    """Sequences of calibration."""
    calibration_length: int = 512
    """Tokens of each."""
    tokenizer: Path | None = None
    data_format: str = "auto"
    text_field: str = "text"
    messages_field: str = ""
    dtype: str = ""


@dataclass(frozen=True, slots=True)
class QuantizeRequest:
    """A checkpoint, the formats that it gets, and how it is written. Fields are named as the options are."""

    weights: Path
    """The checkpoint directory to quantize."""
    out: Path
    """The directory to make; it must be new."""
    spec: Path | Spec | None = None
    """None: the spec is read from the checkpoint's config."""
    overrides: tuple[str, ...] = ()
    """`KEY=VALUE` of --set."""

    fmt: str | None = None
    """Format of every linear that no rule names."""
    block: str | None = None
    """`1x16` or `16x16`: the blocks of all NVFP4 weights."""
    like: Path | None = None
    """A released checkpoint, or its config, whose formats are taken."""
    effective_bits: float | None = None
    """The budget of --auto; None: formats are not chosen."""
    mtp: bool = False
    """Whether --auto may quantize the MTP block."""
    write_spec: Path | None = None
    """Where to write the spec with its final rules."""

    calibration: CalibrationData | None = None
    """Data from which the scales of activations are measured."""
    activation_scales: Path | None = None
    save_activation_scales: Path | None = None

    search: Search = "none"
    """Block scales: the nearest, or the neighbour of least squared error."""
    multimodal: Literal["text", "whole"] = "text"
    """Of a multimodal checkpoint: the text model alone, or the others, too, as they are."""
    resume: bool = False
    part: tuple[int, int] = (1, 1)
    """I of N: every N-th shard, from the I-th."""
    max_shard_bytes: int | None = None
    """Most bytes of a file of the result; None: 5 GB."""

    @property
    def calibrated(self) -> bool:
        """Whether activations will have scales."""
        return self.calibration is not None or self.activation_scales is not None

    @property
    def block_shape(self) -> tuple[int, int] | None:
        """Rows and columns of `block`; None where it is not given."""
        return None if self.block is None else BLOCK_NAMES[self.block]
