"""A build with loaded weights: it runs requests one after the other, and takes other weights in between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from n3c.backends.progress import SILENT, Progress
from n3c.backends.safetensors.checkpoint_fit import fitting_checkpoint
from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError, Span
from n3c.ir.json_file import is_count, read_json
from n3c.runtime.build_folder import OpenedBuild
from n3c.runtime.engines.activations import require_scales, with_scales_of
from n3c.runtime.engines.choice import Device, EngineName, choose_engine
from n3c.runtime.engines.interface import Engine
from n3c.runtime.engines.open import open_engine
from n3c.runtime.numbers import require_number

from .capacity import Capacity
from .drafter import Drafter, MtpDrafter
from .loop import Generation
from .sequence import Options
from .tokenizer import Tokenizer, find_tokenizer


@dataclass(slots=True)
class Runner:
    """Makes the requests of a build with loaded weights. `engine` may be of any kind."""

    build: OpenedBuild
    engine: Engine
    tokenizer: Tokenizer | None
    eos_ids: frozenset[int]
    drafter: Drafter | None
    """None: no speculation."""
    device: Device = "cpu"
    engine_name: EngineName = "onnxruntime"
    rounding: bool = False
    """Whether the engine rounds activations, for which other weights must have scales too."""

    def generation(self, prompts: Sequence[Sequence[int]], options: Options) -> Generation:
        """Return a request, not yet run; N3CError (exit code 2) where it exceeds the build's capacity."""
        capacity = Capacity.of(self.build.spec)
        return Generation(
            self.engine, prompts, options, capacity, self.tokenizer, self.drafter, self.device, self.engine_name
        )

    def replace_weights(self, directory: Path) -> None:
        """Take the weights of another checkpoint of the same spec, without building anything.

        For reinforcement learning, between rollouts. N3CError (exit code 6) where they do not fit; then the old
        weights stay.
        """
        checkpoint = fitting_checkpoint(self.build.spec, directory)
        if self.rounding:
            require_scales(self.build.spec, self.build.served.program, checkpoint)
        self.engine.replace_weights(checkpoint)


def open_runner(
    build: OpenedBuild,
    weights: Path,
    *,
    device: Device = "cpu",
    engine: EngineName | None = None,
    sequences: int = 1,
    continuous: bool = False,
    speculate: bool = True,
    progress: Progress = SILENT,
) -> Runner:
    """Load `weights` for at most `sequences` sequences at once. `speculate` has effect where the spec has [mtp].

    With `continuous` smaller batches of them run too, for sequences that join and leave.
    Without `engine` it is the usual one of the device. N3CError: exit code 2 for no sequences or an engine that does
    not run on the device, 4 where the device is not there, 6 where the weights do not fit.
    """
    require_number("sequences", sequences, least=1)
    chosen = choose_engine(engine, device, build)
    spec = build.spec
    batch = _batch(spec.serving.batch_sizes, sequences)
    speculate = speculate and {"draft", "verify"} <= set(build.served.program.entry_points)
    names = ("prefill", "draft", "verify") if speculate else ("prefill", "decode")
    checkpoint = fitting_checkpoint(spec, weights)
    tokenizer = find_tokenizer([weights], spec.model.vocab_size)
    eos = eos_token_ids(weights) or frozenset(spec.model.eos_token_ids)
    sizes = [size for size in spec.serving.batch_sizes if size < batch and continuous]
    opened = open_engine(chosen, build, names, [*sizes, batch], checkpoint, device, progress)
    rounding = with_scales_of(spec, build.served.program, checkpoint).serving.activations == "as_format"
    return Runner(build, opened, tokenizer, eos, MtpDrafter() if speculate else None, device, chosen, rounding)


def require_weights(directory: Path | None) -> Path:
    """Return the directory of weights; N3CError (exit code 2) for None."""
    if directory is None:
        help_ = "give the checkpoint's directory with --weights"
        raise N3CError(Diagnostic("E0808", "a build holds no weights", help=help_), ExitCode.USAGE)
    return directory


def _batch(sizes: Sequence[int], sequences: int) -> int:
    """Return the smallest batch size that holds `sequences`; the largest where none does, which refuses the request."""
    return min((size for size in sizes if size >= sequences), default=max(sizes))


def eos_token_ids(weights: Path) -> frozenset[int]:
    """Return `eos_token_id` of generation_config.json, a number or a list of them; N3CError (E0810) for another."""
    path = weights / "generation_config.json"
    if not path.is_file():
        return frozenset()
    try:
        config = read_json(path)
    except (OSError, ValueError) as error:
        raise _bad_config(path, f"cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise _bad_config(path, "not a JSON object")
    ids = cast("dict[str, object]", config).get("eos_token_id")
    listed = [] if ids is None else cast("list[object]", ids) if isinstance(ids, list) else [ids]
    if not all(is_count(token) for token in listed):
        raise _bad_config(path, "`eos_token_id` is no token id and no list of them")
    return frozenset(cast("list[int]", listed))


def _bad_config(path: Path, message: str) -> N3CError:
    return N3CError(Diagnostic("E0810", message, Span(str(path))), ExitCode.FILE)
