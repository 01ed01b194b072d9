"""`n3c bench`: measure an engine on a build, by context and batch."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from n3c.backends.progress import SILENT, Progress
from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError
from n3c.runtime.build_folder import OpenedBuild, open_build
from n3c.runtime.engines.choice import ENGINE_HELP, Device, EngineName, choose_engine, require_device
from n3c.runtime.options import Argument, Option, checked
from n3c.runtime.predicted import predicted_times
from n3c.specs.keys import COUNT

if TYPE_CHECKING:  # these load numpy
    from n3c.runtime.engines.interface import Engine

    from .result import Benchmark

CONTEXTS = (128, 1024, 8192)
"""Prompt lengths where none are given: those that fit."""


@checked
def bench(
    build: Annotated[Path | str, Argument("BUILD")],
    weights: Annotated[
        Path | str | None, Option("Checkpoint directory (default: random weights).", metavar="DIR")
    ] = None,
    *,
    engine: Annotated[EngineName | None, Option(ENGINE_HELP)] = None,
    device: Annotated[Device, Option("Where to run.")] = "cpu",
    no_mtp: Annotated[bool, Option("Decode token by token, without drafts.")] = False,
    batch: Annotated[
        Sequence[int], Option("Sequences at once; may repeat (default: serving.batch_sizes).", least=1, most=COUNT)
    ] = (),
    context: Annotated[
        Sequence[int], Option("Tokens of a prompt; may repeat (default: 128, 1024, 8192, as fits).", least=1)
    ] = (),
    new_tokens: Annotated[int, Option("New tokens of a sequence.", least=2)] = 32,
    runs: Annotated[int, Option("Requests that are timed, after one that is not.", least=1)] = 3,
    seed: Annotated[
        int,
        Option("Of prompts and random weights.", least=0),
    ] = 0,
    progress: Progress = SILENT,
) -> "Benchmark":
    """Measure how fast an engine answers requests of random tokens.

    N3CError: exit code 2 where the build cannot take them or the engine does not run on the device, 4 where the device
    is not there or memory lacks, 6 where the build is damaged or the weights do not fit.
    """
    if engine is not None:
        require_device(engine, device)
    progress.phase("open")
    opened = open_build(Path(build))
    chosen = choose_engine(engine, device, opened)
    from n3c.backends.safetensors.locate import checkpoint_directory
    from n3c.runtime.engines.memory import memory_told, require_memory
    from n3c.runtime.generation.capacity import Capacity
    from n3c.runtime.generation.drafter import MtpDrafter

    from .measure import measure
    from .predicted import predicted
    from .result import Benchmark, Row

    spec, capacity = opened.spec, Capacity.of(opened.spec)
    speculative = not no_mtp and {"draft", "verify"} <= set(opened.served.program.entry_points)
    names = ("prefill", "draft", "verify") if speculative else ("prefill", "decode")
    most = capacity.context_length - new_tokens
    if max(context, default=0) > most:
        raise _too_long(max(context), new_tokens, capacity.context_length)
    contexts = context or [c for c in CONTEXTS if c <= most] or [max(1, most)]
    times = predicted_times(opened.out)
    rows: list[Row] = []
    sizes = batch or spec.serving.batch_sizes
    if device == "cpu":
        require_memory(opened.served, max(sizes), max(contexts))
    for size in sizes:
        progress.phase("load")
        directory = None if weights is None else checkpoint_directory(weights)
        with memory_told(f"{size} sequences"):
            running = _opened(opened, chosen, names, size, directory, device, seed, progress)
        progress.phase("measure")
        for length in contexts:
            progress.step(f"{size} x {length} tokens", len(rows), len(contexts) * len(sizes))
            drafter = MtpDrafter() if speculative else None
            with memory_told(f"{size} x {length} tokens"):
                row = measure(running, capacity, drafter, context=length, new_tokens=new_tokens, runs=runs, seed=seed)
            foretold = predicted(
                times,
                _name(device),
                spec.serving,
                batch=size,
                context=length,
                speculative=speculative,
                acceptance_length=row.acceptance_length,
            )
            rows.append(replace(row, predicted=foretold))
        del running  # its memory, before the next one takes as much
    held = f"random weights (seed {seed})" if weights is None else str(weights)
    return Benchmark(Path(build), held, chosen, device, _name(device), speculative, tuple(rows))


def _opened(
    build: OpenedBuild,
    engine: EngineName,
    names: Sequence[str],
    batch: int,
    weights: Path | None,
    device: Device,
    seed: int,
    progress: Progress,
) -> "Engine":
    """Return an engine with the weights of a checkpoint, or random ones: PyTorch's are made on the device."""
    from n3c.backends.safetensors.checkpoint_fit import fitting_checkpoint
    from n3c.passes.lower.model import lower
    from n3c.runtime.engines.open import open_engine
    from n3c.runtime.verification.random_weights import RandomCheckpoint

    if weights is None and engine == "torch":
        from n3c.runtime.engines.torch.model import stored_parameters
        from n3c.runtime.engines.torch.open import torch_engine
        from n3c.runtime.engines.torch.weights import RandomWeights

        made = RandomWeights(stored_parameters(build.spec), seed)
        return torch_engine(build.served, build.spec, names, [batch], made, device, progress)
    checkpoint = (
        RandomCheckpoint(lower(build.spec), seed) if weights is None else fitting_checkpoint(build.spec, weights)
    )
    return open_engine(engine, build, names, [batch], checkpoint, device, progress)


def _too_long(context: int, new_tokens: int, room: int) -> N3CError:
    message = f"a prompt of {context} tokens and {new_tokens} new ones exceed the {room} that this build has room for"
    help_ = "a smaller --context or --new-tokens, or a build with a larger serving.max_seq_len"
    return N3CError(Diagnostic("E0802", message, help=help_), ExitCode.USAGE)


def _name(device: Device) -> str:
    """Return what the device is called."""
    import platform

    if device == "cpu":
        return platform.machine()
    import torch

    return torch.cuda.get_device_name()
