"""Packing weights and quantizing a checkpoint: n3c, ModelOpt, torchao and memcpy, on the same tensors in one run."""

from __future__ import annotations

import importlib
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from n3c.backends.safetensors import nvfp4
from n3c.backends.safetensors.packing import Array, Search, block_maxima, nvfp4_scale_2, pack_nvfp4, pack_nvfp4_rows
from n3c.compiler.report.tool_versions import version

from .synthetic import write_checkpoint

TITLE = "n3c quantize"
CORES = len(os.sched_getaffinity(0))
_INSTALL = "`pip install --constraint constraints.txt '.[bench]'`, as `make bench` does"


def run(quick: bool) -> Iterator[str]:
    """Yield the tables: speed of packing, error of each method, a large checkpoint end to end."""
    yield from _speed(quick)
    yield ""
    yield from _errors(quick)
    yield ""
    yield from _checkpoint(quick)


def as_array(weight: Tensor) -> Array:
    """Return a BF16 tensor as numpy sees it, without a copy."""
    return weight.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)


def _speed(quick: bool) -> Iterator[str]:
    experts = 4 if quick else 64
    generator = torch.Generator().manual_seed(0)
    sets = {
        "4096x4096": [torch.randn(4096, 4096, generator=generator).mul_(0.02).bfloat16()],
        f"{experts} x 1856x2688": [
            torch.randn(1856, 2688, generator=generator).mul_(0.02).bfloat16() for _ in range(experts)
        ],
    }
    peers = ", ".join(f"{name} {version(name) or 'not installed'}" for name in ("numba", "nvidia-modelopt", "torchao"))
    yield f"Peers and compiler: {peers}." + ("" if version("torchao") else f" For torchao: {_INSTALL}.")
    yield (
        "BF16 weights already in memory, best of interleaved runs; GB/s are of BF16 read. All allocate what they"
        " return. memcpy is PyTorch's `copy_` of the BF16 source into memory that is there already.\n"
    )
    yield "| weights | implementation | threads | ms | GB/s | times ModelOpt | share of memcpy |"
    yield "|---|---|---:|---:|---:|---:|---:|"
    for name, tensors in sets.items():
        size = sum(tensor.nbytes for tensor in tensors)
        for threads in sorted({1, CORES}):
            best = _best(_contestants(tensors, threads), runs=2 if quick else 5, threads=threads)
            for who, seconds in best.items():
                yield (
                    f"| {name} | {who} | {threads} | {1e3 * seconds:.1f} | {size / seconds / 1e9:.2f}"
                    f" | {best['ModelOpt'] / seconds:.1f} | {best['memcpy'] / seconds:.2f} |"
                )


def _contestants(tensors: list[Tensor], threads: int) -> dict[str, Callable[[], object]]:
    warnings.simplefilter("ignore")
    modelopt = importlib.import_module("modelopt.torch.quantization.qtensor.nvfp4_tensor").NVFP4QTensor
    arrays, copies = [as_array(t) for t in tensors], [torch.empty_like(t) for t in tensors]
    pool = ThreadPoolExecutor(threads)

    def ours(block_rows: int, search: Search = "none") -> None:
        if len(arrays) > 1:
            list(pool.map(partial(pack_nvfp4, block_rows=block_rows, search=search), arrays))
            return
        weight, rows = arrays[0], arrays[0].shape[0] // (4 * threads)
        bands = [weight[at : at + rows] for at in range(0, weight.shape[0], rows)]
        maxima = list(pool.map(block_maxima, bands))
        scale_2 = nvfp4_scale_2(max(amax for _, amax in maxima), search)
        pack = partial(pack_nvfp4_rows, scale_2=scale_2, block_rows=block_rows, search=search, measure=False)
        list(pool.map(pack, bands, [most for most, _ in maxima]))

    def memcpy() -> None:
        for source, copy in zip(tensors, copies, strict=True):
            copy.copy_(source)

    found: dict[str, Callable[[], object]] = {
        "n3c 1x16": lambda: ours(1),
        "n3c 16x16": lambda: ours(16),
        "n3c 1x16 --search mse": lambda: ours(1, "mse"),
        "ModelOpt": lambda: [modelopt.quantize(t, 16) for t in tensors],
    }
    if version("torchao"):
        logging.disable(logging.WARNING)  # it tells of CUDA libraries that it does not find
        torchao = importlib.import_module("torchao.prototype.mx_formats.nvfp4_tensor")
        logging.disable(logging.NOTSET)
        tensor_scale, to_nvfp4 = torchao.per_tensor_amax_to_scale, torchao.NVFP4Tensor.to_nvfp4
        found["torchao"] = lambda: [to_nvfp4(t, per_tensor_scale=tensor_scale(t.abs().max())) for t in tensors]
    return found | {"memcpy": memcpy}


def _best(contestants: dict[str, Callable[[], object]], *, runs: int, threads: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    try:
        seconds: dict[str, list[float]] = {who: [] for who in contestants}
        for turn in range(runs + 1):
            for who, work in contestants.items():
                if turn > 1 and statistics.mean(seconds[who]) > 3:
                    continue  # the slow ones vary little
                start = time.perf_counter()
                work()
                if turn:  # the first compiles and touches memory
                    seconds[who].append(time.perf_counter() - start)
        return {who: min(taken) for who, taken in seconds.items()}
    finally:
        torch.set_num_threads(CORES)


def _errors(quick: bool) -> Iterator[str]:
    rows = 256 if quick else 1024
    g = torch.Generator().manual_seed(0)
    normal = torch.randn(rows, 2048, generator=g) * 0.02
    student = torch.distributions.StudentT(5.0)
    torch.manual_seed(0)
    scale = torch.exp(0.5 * torch.randn(rows, 1, generator=g)) * torch.exp(0.5 * torch.randn(1, 2048, generator=g))
    weights = {
        "gaussian": normal,
        "Student t, 5 degrees": student.sample(torch.Size((rows, 2048))) * 0.02,
        "gaussian, unequal rows and columns": normal * scale,
    }
    yield f"Relative error Σ(ŵ − w)² / Σw² and SQNR of BF16 weights [{rows}, 2048].\n"
    yield "| weights | block | nearest | SQNR | `--search mse` | SQNR | error |"
    yield "|---|---|---:|---:|---:|---:|---:|"
    for name, weight in weights.items():
        array = as_array(weight.bfloat16())
        for block_rows in (1, 16):
            plain, searched = (_relative(array, block_rows, search) for search in ("none", "mse"))
            yield (
                f"| {name} | {block_rows}x16 | {plain:.6f} | {_db(plain):.2f} dB | {searched:.6f}"
                f" | {_db(searched):.2f} dB | {100 * (searched / plain - 1):+.1f} % |"
            )


def _relative(weight: Array, block_rows: int, search: Any) -> float:
    exact = weight.astype(np.float64)
    error = nvfp4.dequantize(pack_nvfp4(weight, block_rows, search)) - exact
    return float((error**2).sum() / (exact**2).sum())


def _db(relative: float) -> float:
    return -10 * float(np.log10(relative))


def _checkpoint(quick: bool) -> Iterator[str]:
    pattern = "ME*" if quick else "MEMEM*E"
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        source = Path(folder) / "source"
        start = time.perf_counter()
        size = write_checkpoint(source, pattern, experts=8 if quick else 128)
        written = time.perf_counter() - start
        yield f"A checkpoint of Nano's layers, `{pattern}`: {size / 1e9:.1f} GB of BF16, written in {written:.0f} s.\n"
        yield "| run | seconds | GB/s read | peak memory | above the interpreter |"
        yield "|---|---:|---:|---:|---:|"
        base = _peak([sys.executable, "-c", _PEAK])
        for options in ([], ["--search", "mse"]) if not quick else ([],):
            out = Path(folder) / "out"
            done = subprocess.run(
                [*_N3C, "quantize", "--fmt", "nvfp4", "--weights", source, "-o", out, "--json", *options],
                check=True,
                capture_output=True,
                text=True,
            )
            data = json.loads(done.stdout)
            peak, seconds = data["peak_rss_bytes"], data["seconds"]
            yield (
                f"| {' '.join(options) or 'nearest'} | {seconds:.1f} | {size / seconds / 1e9:.2f}"
                f" | {peak / 2**30:.2f} GiB | {(peak - base) / 2**30:.2f} GiB |"
            )
            subprocess.run(["rm", "-r", out], check=True)


_N3C = (sys.executable, "-c", "from n3c.compiler.cli.main import main; main()")
_PEAK = "from n3c.compiler.report.tool_versions import peak_rss_bytes; print(peak_rss_bytes())"


def _peak(command: list[str]) -> int:
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
