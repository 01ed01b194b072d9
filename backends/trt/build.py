"""Build a plan from an ONNX model, in this process, on a machine with or without a GPU.

The network is strongly typed: the types of the ONNX graph are the types of the kernels. Detailed
profiling verbosity adds names to the plan and makes the builder list its kernels, which the audit
of realised precision reads.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from n3c.backends.machine import peak_rss_bytes
from n3c.backends.progress import SILENT, Progress
from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError, Span

from .log import Captured, Steps, make_logger, make_monitor, make_writer
from .module import flavour_of
from .targets import named, require

if TYPE_CHECKING:
    from .layers import Kernel

_HEARTBEAT = 0.2
"""Seconds between reports of progress."""

Locate = Callable[[str], Span | None]
"""Name of an ONNX node → where the spec asked for it."""

Range = tuple[int, int, int]
"""The least, usual and largest length of a dynamic input."""


@dataclass(frozen=True, slots=True)
class PlanResult:
    """A plan that was built."""

    path: Path
    bytes: int
    listing: str
    """What the builder says of its kernels."""
    scratch_bytes: int
    """Device memory that the plan needs besides weights, inputs and outputs."""
    parse_seconds: float = 0.0
    seconds: float = 0.0
    """Parsing and building; 0 of a plan that was built before."""
    peak_rss_bytes: int | None = None
    """The most memory that the process which built it has held."""

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """The kernels of the listing, read anew each time; ValueError where it is not understood."""
        from .layers import parse_layers  # here, as processes that only build do without

        return parse_layers(self.listing)


def build_plan(
    model: bytes | Path,
    plan: Path,
    trt: Any,
    *,
    sms: Sequence[int],
    ranges: Mapping[str, Range] | None = None,
    progress: Progress = SILENT,
    locate: Locate | None = None,
) -> PlanResult:
    """Compile `model` (serialised ONNX, or a file of it with its external data) for `sms` into the file `plan`.

    `trt` is a module of `load_trt`. `ranges` gives each input [L] of dynamic length its least, usual and
    largest L. N3CError where there is no such target (E0502, E0503), the parser (E0504) or the builder
    (E0505) refuses, or `plan` cannot be written. After Ctrl-C the builder stops at its next step, nothing
    is written, and KeyboardInterrupt goes on; a second Ctrl-C does not wait for the builder.
    """
    faults = require(sms, flavour_of(trt))
    if faults:
        raise N3CError(faults, ExitCode.TARGET)
    start = time.perf_counter()
    captured, steps = Captured(), Steps()
    logger = make_logger(trt, captured)
    monitor = make_monitor(trt, steps)  # the builder only borrows it
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    steps.begin("Parsing ONNX", 0)
    _report(steps, progress)
    parser = _parse(trt, network, logger, model, locate)
    _allow_decomposed_attention(trt, network)
    parsed = time.perf_counter()
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.progress_monitor = monitor
    _set_targets(trt, config, sms)
    _keep_capturable(trt, config)
    if ranges:
        profile = builder.create_optimization_profile()
        for name, lengths in ranges.items():
            profile.set_shape(name, *((length,) for length in lengths))
        config.add_optimization_profile(profile)
    with _written(plan) as write:
        writer = make_writer(trt, write)
        built = _in_thread(lambda: builder.build_serialized_network_to_stream(network, config, writer), steps, progress)
        if not built:
            raise N3CError(_builder_faults(captured, sms, locate), ExitCode.TARGET)
    del parser  # it owns what the network reads while it is built
    return PlanResult(
        plan,
        plan.stat().st_size,
        captured.listing,
        max(captured.figures.values(), default=0),
        parsed - start,
        time.perf_counter() - start,
        peak_rss_bytes(),
    )


def _set_targets(trt: Any, config: Any, sms: Sequence[int]) -> None:
    """Say which GPUs the plan is for.

    TensorRT-RTX compiles for any of its own; TensorRT for the one that is there, or with that for every
    later architecture too, which is the nearest that it has to a list.
    """
    if hasattr(trt, "ComputeCapability"):
        config.num_compute_capabilities = len(sms)
        for i, sm in enumerate(sms):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), i)
    elif len(sms) > 1:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS


def _keep_capturable(trt: Any, config: Any) -> None:
    """Let no kernel allocate while it runs, which a CUDA graph forbids; TensorRT-RTX promises that only when asked."""
    if hasattr(getattr(trt, "BuilderFlag", None), "REQUIRE_USER_ALLOCATION"):
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)


def _allow_decomposed_attention(trt: Any, network: Any) -> None:
    """Let the builder spell out attention of a shape that none of its kernels takes, as head_dim 13.

    Without that it fails; where it has a kernel, it still takes that.
    """
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type == trt.LayerType.ATTENTION_OUTPUT:
            layer.__class__ = trt.IAttentionOutputLayer  # the binding returns the base class
            layer.attention.decomposable = True


def _parse(trt: Any, network: Any, logger: Any, model: bytes | Path, locate: Locate | None) -> Any:
    """Parse `model` into `network` and return the parser."""
    parser = trt.OnnxParser(network, logger)
    ok = parser.parse_from_file(str(model)) if isinstance(model, Path) else parser.parse(model)
    if ok:
        return parser
    faults: list[Diagnostic] = []
    for i in range(parser.num_errors):
        error = parser.get_error(i)
        name = error.node_name()
        where = f" at node `{name}` ({error.node_operator()})" if name else ""
        faults.append(
            Diagnostic("E0504", f"the ONNX parser refuses{where}: {_one_line(error.desc())}", locate and locate(name))
        )
    raise N3CError(faults or Diagnostic("E0504", "the ONNX parser cannot read the model"), ExitCode.TARGET)


def _builder_faults(captured: Captured, sms: Sequence[int], locate: Locate | None) -> list[Diagnostic]:
    """Return the builder's errors, each at the spec line of the first node that it names."""
    faults: list[Diagnostic] = []
    for message in dict.fromkeys(captured.errors):
        spans = (locate(word) for word in re.split(r"[\s(),:\[\]]+", message)) if locate else iter(())
        span = next((span for span in spans if span is not None), None)
        faults.append(
            Diagnostic("E0505", f"the TensorRT builder fails for SM {named(sms)}: {_one_line(message)}", span)
        )
    return faults or [Diagnostic("E0505", f"the TensorRT builder fails for SM {named(sms)} without saying why")]


def _one_line(text: str, limit: int = 600) -> str:
    return " ".join(text.split())[:limit]


@contextmanager
def _written(path: Path) -> Generator[Callable[[Any], int]]:
    """Give a function that appends to a file which becomes `path` if all goes well, and else is gone."""
    partial = path.with_name(f"{path.name}.partial")
    failures: list[OSError] = []
    try:
        with partial.open("wb") as file:

            def write(piece: Any) -> int:
                try:
                    return file.write(piece)
                except OSError as error:  # the caller is C++, which takes 0 for a failure
                    failures.append(error)
                    return 0

            yield write
        partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        cause = failures[0] if failures else error
        if isinstance(cause, OSError):
            raise N3CError(Diagnostic("E0613", f"cannot write {path}: {cause}"), ExitCode.FILE) from error
        raise


def _report(steps: Steps, progress: Progress) -> None:
    now = steps.now()
    progress.step(now.phase, now.done, now.total)


def _in_thread(build: Callable[[], bool], steps: Steps, progress: Progress) -> bool:
    """Run `build` in a thread and report until it is done: one compilation lasts minutes without an event."""
    result: list[bool] = []
    thread = threading.Thread(target=lambda: result.append(bool(build())), name="TensorRT builder", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(_HEARTBEAT)
            _report(steps, progress)
    except BaseException:
        steps.cancelled = True
        thread.join()
        raise
    return bool(result and result[0])
