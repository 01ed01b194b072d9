"""What the parts share: their setting, how they report, clocks, models with random weights."""

from __future__ import annotations

import atexit
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from n3c.backends.gpus import GPUS, Gpu, gpu_named
from n3c.backends.torch.emit import emit
from n3c.backends.torch.loading import load_package, write_files
from n3c.specs.load import load_spec
from n3c.specs.schema import Spec

SPECS = Path(__file__).parents[2] / "specs"

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Setting:
    """How a part is to run."""

    device: str = "cuda"
    tiny: bool = False
    """Sizes that a CPU manages, to show that the part works."""


def report(run: Callable[[Setting], Iterator[Row]]) -> None:
    """Run a part as the setting in argv says, and print each row as a line of JSON when it is known."""
    for row in run(Setting(**json.loads(sys.argv[1]))):
        print(json.dumps(row), flush=True)


def side_by_side() -> int:
    """Return how many processes that compile kernels, each on some four cores, run at a time."""
    return max(1, min(4, (os.cpu_count() or 1) // 4))


def spec_of(name: str, setting: Setting, overrides: Mapping[str, object] | None = None) -> Spec:
    """Return a shipped spec with values replaced; for a tiny setting specs/tiny.toml in its place."""
    sets = [f"{key}={json.dumps(value)}" for key, value in (overrides or {}).items()]
    spec, _ = load_spec(SPECS / f"{'tiny' if setting.tiny else name}.toml", sets)
    return spec


def card(setting: Setting) -> Gpu:
    """Return the GPU at hand; an H100 on a CPU, and where n3c does not know the card."""
    import torch

    known = gpu_named(torch.cuda.get_device_name()) if setting.device == "cuda" else None
    return known or GPUS["H100 SXM"]


def generated(spec: Spec) -> Any:
    """Return the generated package of a spec, train.py's part included, from files that stay until the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="n3c-gpu-")
    atexit.register(folder.cleanup)
    write_files(emit(spec, "0" * 64), Path(folder.name))
    return load_package(Path(folder.name))


@contextmanager
def made_on(device: str, dtype: Any) -> Generator[None]:
    """Make parameters on a device in a type: a model of 63 GB never lies in the host's memory."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def synchronize(setting: Setting) -> None:
    """Wait for the device."""
    import torch

    if setting.device == "cuda":
        torch.cuda.synchronize()


def seconds_of(setting: Setting, work: Callable[[], object], runs: int = 10, warm: int = 3) -> float:
    """Return the median time of `work` in seconds: by events on a GPU, by the wall clock on a CPU."""
    import torch

    if setting.tiny:
        runs, warm = 2, 1
    for _ in range(warm):
        work()
    synchronize(setting)
    taken: list[float] = []
    if setting.device != "cuda":
        for _ in range(runs):
            start = time.perf_counter()
            work()
            taken.append(time.perf_counter() - start)
        return statistics.median(taken)
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(runs)]
    for start_event, end_event in pairs:
        start_event.record()
        work()
        end_event.record()
    torch.cuda.synchronize()
    return float(statistics.median(a.elapsed_time(b) for a, b in pairs)) / 1e3


def seconds_of_each(setting: Setting, calls: Sequence[Callable[[], object]], most: int = 48) -> float:
    """Return the seconds of one of the calls, made in turn, `most` in all where they are fewer; one graph on a GPU."""
    import torch

    turns = [calls[i % len(calls)] for i in range(2 if setting.tiny else max(most, len(calls)))]

    def work() -> None:
        for call in turns:
            call()

    if setting.device != "cuda":
        return seconds_of(setting, work) / len(turns)
    work()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        work()
    return seconds_of(setting, graph.replay, runs=5, warm=2) / len(turns)


def wall_seconds_of(setting: Setting, work: Callable[[], object], runs: int = 10, warm: int = 3) -> float:
    """Return the median time of `work`, which waits for the device, by the wall clock in seconds."""
    if setting.tiny:
        runs, warm = 2, 2
    taken: list[float] = []
    for turn in range(warm + runs):
        synchronize(setting)
        start = time.perf_counter()
        work()
        synchronize(setting)
        if turn >= warm:
            taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def peak_memory(setting: Setting) -> float:
    """Return the most memory that PyTorch held on the device, in GB (1e9 bytes); 0 on a CPU."""
    import torch

    return torch.cuda.max_memory_allocated() / 1e9 if setting.device == "cuda" else 0.0


def relative_error(got: Any, want: Any) -> float:
    """Return ‖got - want‖ / ‖want‖ in float64, with three digits; both are tensors or arrays of one shape."""
    import torch

    a, b = (torch.as_tensor(t).double().cpu() for t in (got, want))
    return float(f"{float((a - b).norm() / b.norm()):.2e}")


def kernel_table(setting: Setting, work: Callable[[], object], most: int = 25) -> list[dict[str, Any]]:
    """Return the kernels of one call of `work` by name: calls and milliseconds on the device, most first."""
    from torch.profiler import ProfilerActivity, profile

    work()
    synchronize(setting)
    activities = [ProfilerActivity.CUDA] if setting.device == "cuda" else [ProfilerActivity.CPU]
    with profile(activities=activities) as trace:
        work()
        synchronize(setting)
    on_gpu = setting.device == "cuda"
    rows: list[dict[str, Any]] = [
        {
            "kernel": event.key[:120],
            "calls": event.count,
            "ms": round((event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3, 3),
        }
        for event in trace.key_averages()
    ]
    return sorted(rows, key=_milliseconds, reverse=True)[:most]


def _milliseconds(row: Mapping[str, Any]) -> float:
    return float(row["ms"])
